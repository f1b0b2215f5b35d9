"""The verdict: every requirement of a gate tested on what was measured, and all of them together.

A line passes when its data prove it, fails when they refute it, and is inconclusive in between; `docs/gate.md` derives
the tests. Knows nothing about models, files or how a report is drawn.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from quantlab.errors import GateError, nearest
from quantlab.eval.findings import Finding, examine
from quantlab.eval.gate_file import Gate, Rule
from quantlab.eval.metrics import Metric, measured
from quantlab.eval.result import GateLine, GateResult, NoiseFloor, TaskResult, TextResult, Verdict
from quantlab.eval.statistics import holm


def check_measurable(gate: Gate, names: Collection[str]) -> None:
    """Raises GateError, at the rule's place, when the gate asks for a metric that is not among `names`.

    `names` is what `metrics.available` gives for the texts and tasks that will be measured.
    """
    missing = [(rule, place) for rule, place in zip(gate.rules, gate.places, strict=True) if rule.metric not in names]
    for rule, place in missing:
        if not rule.optional:
            fix = "add --tasks or --suite" if rule.metric.startswith("task") else None
            close = nearest(rule.metric, names)
            hint = f", did you mean '{close}'?" if close else ""
            raise GateError(f"'{rule.metric}' is not measured{hint}", where=place, fix=fix)
    if len(missing) == len(gate.rules):
        raise GateError("nothing that this gate asks for is measured", where=gate.source)


def judge(gate: Gate, texts: Sequence[TextResult], tasks: Sequence[TaskResult], noise: NoiseFloor | None) -> GateResult:
    """Every line's verdict and the whole's: fail if a line fails, else inconclusive if one is, else pass.

    A line fails when it is significant after Holm's correction over all, so a candidate that meets every requirement
    fails with probability at most alpha. The whole passes only if every line passes at alpha, so a candidate that
    violates a line which asks for proof passes with probability at most alpha (Berger 1982).
    Raises GateError when a metric was not measured.
    """
    metrics = measured(texts, tasks, noise)
    names = {name for metric in metrics for name in metric.names}
    check_measurable(gate, names)
    cases = list(_cases(gate, metrics))
    findings = [examine(rule, metric.quantity, gate.alpha, len(cases)) for rule, metric in cases]
    adjusted = iter(holm([finding.p_fail for finding in findings if finding.p_fail is not None]))
    lines = tuple(
        _line(metric, finding, None if finding.p_fail is None else next(adjusted), gate.alpha)
        for (_, metric), finding in zip(cases, findings, strict=True)
    )
    left_out = tuple(dict.fromkeys(rule.metric for rule in gate.rules if rule.metric not in names))
    verdict = worst(line.verdict for line in lines)
    return GateResult(source=gate.source, alpha=gate.alpha, verdict=verdict, lines=lines, left_out=left_out)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Fail before inconclusive before pass."""
    found = set(verdicts)
    return "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"


def _cases(gate: Gate, metrics: Sequence[Metric]) -> Iterator[tuple[Rule, Metric]]:
    """Every rule with every metric that it names."""
    for rule in gate.rules:
        yield from ((rule, metric) for metric in metrics if rule.metric in metric.names)


def _line(metric: Metric, finding: Finding, p_value: float | None, alpha: float) -> GateLine:
    verdict, reason = _decide(finding, p_value, alpha)
    return GateLine(
        metric=metric.names[0],
        requirement=finding.requirement,
        limit=finding.limit,
        measured=finding.measured,
        low=finding.low,
        high=finding.high,
        verdict=verdict,
        p_value=p_value,
        reason=f"{finding.observed}: {reason}",
        below_noise=finding.below_noise,
    )


def _decide(finding: Finding, p_value: float | None, alpha: float) -> tuple[Verdict, str]:
    """A line's verdict and the words for it; `p_value` is p_fail after correction."""
    refuted = finding.p_pass == 1.0 if p_value is None else p_value <= alpha
    if refuted and finding.below_noise:
        return "inconclusive", "no more than noise alone gives, so no difference to speak of"
    if refuted:
        return "fail", finding.refuted
    if finding.p_pass is None or finding.p_pass <= alpha:
        return "pass", finding.shown + (" (within the noise floor)" if finding.below_noise else "")
    if p_value is not None and finding.p_fail is not None and finding.p_fail <= alpha:
        return (
            "inconclusive",
            f"{finding.refuted}, but not once corrected for looking at many lines (p = {p_value:.2g})",
        )
    return "inconclusive", finding.unsettled
