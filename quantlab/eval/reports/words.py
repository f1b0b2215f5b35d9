"""Numbers and verdicts as words, the same in every report; and text from outside made safe to show.

Knows nothing about terminals, Markdown or HTML.
"""

import math
import unicodedata

from quantlab.errors import printable
from quantlab.eval.result import Estimate, GateLine, GateResult, Report, Verdict

MAX_NAMED, MAX_LEFT_OUT = 3, 8
WORDS: dict[Verdict, str] = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE"}
NO_GATE = "MEASURED"


def visible(text: str, limit: int) -> str:
    """The beginning of `text`, `limit` characters or less, on its lines; what a screen would obey or hide is escaped.

    Control characters could rewrite a terminal's line, and marks of direction could swap an answer's words. More than
    a few marks on one letter would cover the lines above and below.
    """
    kept = "".join(c if c == "\n" or c.isprintable() else printable(c) for c in text[:limit])
    left = len(text) - limit
    return _few_marks(kept)[:limit] + (f" ... ({left:,} more characters)" if left > 0 else "")


def one_line(text: str, limit: int = 200) -> str:
    """`text` on one printable line, cut after `limit` characters."""
    return printable(visible(text, limit))


def verdict_word(report: Report) -> str:
    """PASS, FAIL or INCONCLUSIVE, or MEASURED where no gate was asked for."""
    return WORDS[report.gate.verdict] if report.gate else NO_GATE


def verdict_sentence(report: Report) -> str:
    """One sentence: what came of the gate's lines, and which ones decide."""
    gate = report.gate
    if gate is None:
        return "No gate was applied: these are measurements without a verdict."
    return _outcome(gate) + left_out(gate)


def left_out(gate: GateResult) -> str:
    """A sentence, after a blank, on the optional lines that nothing was measured for; empty if there are none."""
    if not gate.left_out:
        return ""
    shown = ", ".join(one_line(metric, 60) for metric in gate.left_out[:MAX_LEFT_OUT])
    more = len(gate.left_out) - MAX_LEFT_OUT
    return f" Not measured and so not judged: {shown}{f' and {more} more' if more > 0 else ''}."


def in_order(gate: GateResult) -> list[GateLine]:
    """The gate's lines, the missed ones first, then the undecided ones."""
    order: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
    return sorted(gate.lines, key=lambda line: order.index(line.verdict))


def measured(line: GateLine, value: float) -> str:
    """A value of the line's metric in the units of its requirement."""
    if "point" in line.requirement:
        return f"{points(value, 2)} points"
    if line.metric.startswith("task") or line.metric.endswith("agreement"):
        return percent(value, 2)
    return f"{value:.4g}"


def why(line: GateLine) -> str:
    """The reason of a line's verdict, with what it rests on."""
    reason = one_line(line.reason, 300)
    if line.below_noise and "noise" not in reason:
        reason += " (within the noise floor)"
    # p says how hardly a sound candidate looks this bad: of a line that passed it would tell nothing.
    return f"{reason}, p = {line.p_value:.2g}" if line.verdict == "fail" and line.p_value is not None else reason


def exp(value: float) -> float:
    """The exponential, short of overflow: a result file may say anything."""
    return math.exp(min(value, 690.0))


def perplexity(value: float) -> str:
    """`27.004`, `1,605.9`."""
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def small(value: float) -> str:
    """Three significant digits, for nats and probabilities: `0.0481`, `0.000021`, `2.1e-06`."""
    size = abs(value)
    if not 1e-5 <= size < 1e-4:
        return f"{value:.3g}"
    return f"{value:.{2 - math.floor(math.log10(size))}f}".rstrip("0")


def percent(share: float, digits: int = 1) -> str:
    """`86.5 %` of a share."""
    return f"{100 * share:.{digits}f} %"


def points(share: float, digits: int = 1) -> str:
    """`-0.6` percentage points of a difference of shares; never a negative zero."""
    text = f"{100 * share:+.{digits}f}"
    return text.lstrip("+-") if not float(text) else text


def with_error(estimate: Estimate) -> str:
    """`0.0481 ± 0.0007`."""
    error = estimate.standard_error
    return small(estimate.value) if error is None else f"{small(estimate.value)} ± {error:.1g}"


def percent_with_error(estimate: Estimate) -> str:
    """`86.5 % ± 0.2`."""
    error = estimate.standard_error
    return percent(estimate.value) if error is None else f"{percent(estimate.value)} ± {100 * error:.1g}"


def _outcome(gate: GateResult) -> str:
    missed, undecided = ([line for line in gate.lines if line.verdict == which] for which in ("fail", "inconclusive"))
    total = len(gate.lines)
    if missed:
        return f"{_count(len(missed), total)} missed: {_told(missed)}."
    if undecided:
        return f"Nothing is missed, but {_count(len(undecided), total)} undecided: {_told(undecided)}."
    return "The only requirement is met." if total == 1 else f"All {total} requirements are met."


def _few_marks(text: str, most: int = 3) -> str:
    kept, run = [], 0
    for c in text:
        run = run + 1 if unicodedata.combining(c) else 0
        if run <= most:
            kept.append(c)
    return "".join(kept)


def _count(some: int, total: int) -> str:
    return f"{some} of {total} requirement{'s' if total != 1 else ''} {'is' if some == 1 else 'are'}"


def _told(lines: list[GateLine]) -> str:
    """The metrics that decide; one alone with its reason."""
    shown = [one_line(line.metric, 60) for line in lines[:MAX_NAMED]]
    if len(lines) == 1:
        return f"{shown[0]}, {one_line(lines[0].reason, 200).rstrip('.')}"
    more = len(lines) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
