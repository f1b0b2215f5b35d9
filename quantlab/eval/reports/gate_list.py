"""The gate's lines on a page: verdict, requirement, reason, and where the measured value lies against the limit.

Knows nothing about the page around them.
"""

from quantlab.eval.reports import svg
from quantlab.eval.reports.elements import Markup, element, number
from quantlab.eval.reports.panels import folded
from quantlab.eval.reports.words import WORDS, in_order, measured, one_line, why
from quantlab.eval.result import GateLine, GateResult

MAX_LINES = 150
MAX_MET = 4  # met requirements that are shown; more of them are folded, so that the figures below are seen at once
ROW = 24.0


def gate_list(gate: GateResult) -> Markup:
    """Every line, the missed ones first; the met ones to be unfolded when they are many."""
    lines = in_order(gate)[:MAX_LINES]
    met = [line for line in lines if line.verdict == "pass"]
    folds = len(met) > MAX_MET
    shown = [line for line in lines if not (folds and line.verdict == "pass")]
    parts = [_list(shown)] if shown else []
    if folds:
        title = f"{len(met)} met" if shown else f"All {len(met)} are met"
        parts.append(folded(title, _list(met)))
    left = len(gate.lines) - len(lines)
    more = f" {left:,} more lines are in report.json." if left else ""
    note = f"Bars: the measured value within its bounds; upright line: the limit. Gate: {one_line(gate.source)}.{more}"
    return element("div", {"class": "requirements"}, *parts, element("p", {"class": "note"}, note))


def _list(lines: list[GateLine]) -> Markup:
    return element("ul", {"class": "gate"}, *(_item(line) for line in lines))


def _item(line: GateLine) -> Markup:
    name = element(
        "p", {"class": "name"}, element("strong", None, one_line(line.metric)), f" {one_line(line.requirement)}"
    )
    return element(
        "li",
        {"class": line.verdict},
        element("span", {"class": f"badge {line.verdict}"}, WORDS[line.verdict]),
        element("div", None, name, element("p", {"class": "reason"}, why(line))),
        gauge(line),
    )


def gauge(line: GateLine) -> Markup:
    """The measured value and its bounds as a bar, the limit as an upright line; empty where there is no value."""
    if line.measured is None or line.limit is None:
        return element("span", None)
    low, high = (line.measured if bound is None else bound for bound in (line.low, line.high))
    x = svg.Scale(*svg.span([low, high, line.measured, line.limit]), 8.0, 152.0)
    label = f"measured {measured(line, line.measured)}, limit {measured(line, line.limit)}"
    limit = svg.line((x(line.limit), 2.0), (x(line.limit), ROW - 2), "limit")
    bar = svg.whisker(ROW / 2, x, (low, line.measured, high), line.verdict)
    return element("svg", {"viewBox": f"0 0 160 {number(ROW)}", "role": "img", "aria-label": label}, bar, limit)
