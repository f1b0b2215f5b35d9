"""Numbers and verdicts as words, the same in every report; and text from outside made safe to show.

Knows nothing about terminals, Markdown or HTML.
"""

import math
import unicodedata

from quantlab.errors import printable
from quantlab.eval.result import Estimate, GateResult, Report, Verdict

MAX_NAMED = 3
WORDS: dict[Verdict, str] = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE"}
NO_GATE = "MEASURED"


def visible(text: str, limit: int) -> str:
    """At most `limit` characters of `text` over several lines; what a screen would obey or hide is escaped instead.

    Control characters could rewrite a terminal's line, and marks of direction could swap an answer's words. More than
    a few marks on one letter would cover the lines above and below.
    """
    shown = text[:limit]
    kept = "".join(c if c == "\n" or c.isprintable() else printable(c) for c in shown)
    left = len(text) - len(shown)
    return _few_marks(kept) + (f" ... ({left:,} more characters)" if left else "")


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
    missed, undecided = _of(gate, "fail"), _of(gate, "inconclusive")
    total = len(gate.lines)
    if missed:
        return f"{_count(len(missed), total)} missed: {_named(missed)}."
    if undecided and gate.verdict == "pass":
        return f"Nothing is missed; {_count(len(undecided), total)} undecided, which this gate allows."
    if undecided:
        return f"Nothing is missed, but {_count(len(undecided), total)} undecided: {_named(undecided)}."
    return f"Every requirement is met ({total} of {total})."


def exp(value: float) -> float:
    """The exponential, short of overflow: a result file may say anything."""
    return math.exp(min(value, 690.0))


def perplexity(value: float) -> str:
    """`27.004`, `1,605.9`."""
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"


def small(value: float) -> str:
    """Three significant digits, for nats and probabilities: `0.0481`, `2.2e-05`."""
    return f"{value:.3g}"


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


def _few_marks(text: str, most: int = 3) -> str:
    kept, run = [], 0
    for c in text:
        run = run + 1 if unicodedata.combining(c) else 0
        if run <= most:
            kept.append(c)
    return "".join(kept)


def _of(gate: GateResult, verdict: Verdict) -> list[str]:
    return [line.metric for line in gate.lines if line.verdict == verdict]


def _count(some: int, total: int) -> str:
    return f"{some} of {total} requirement{'s' if total != 1 else ''} {'is' if some == 1 else 'are'}"


def _named(metrics: list[str]) -> str:
    shown = [one_line(metric, 60) for metric in metrics[:MAX_NAMED]]
    more = len(metrics) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
