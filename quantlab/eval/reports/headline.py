"""The few figures that most readers want, large.

Knows nothing about how a page shows them.
"""

from dataclasses import dataclass

from quantlab.eval.reports.tables import noise_of, pooled, ratio, shrink
from quantlab.eval.reports.words import one_line, percent, perplexity, points, small
from quantlab.eval.result import Report, TextResult
from quantlab.units import human_bytes


@dataclass(frozen=True, slots=True)
class Card:
    """One figure: what it is, its value, and what to compare it with."""

    name: str
    value: str
    detail: str


def cards(report: Report) -> list[Card]:
    """Size, bits, the first text's perplexity, KL divergence and agreement, and the tasks together."""
    before, after = report.baseline, report.candidate
    shrunk = shrink(report)
    found = [
        Card("size", human_bytes(after.bytes), f"was {human_bytes(before.bytes)}" + (f", {shrunk}" if shrunk else "")),
        Card("bits per weight", f"{after.bits_per_weight:.3f}", f"was {before.bits_per_weight:.3f}"),
    ]
    for text in report.texts[:1]:
        found += _text_cards(report, text)
    if report.tasks:
        found.append(_tasks_card(report))
    return found


def _text_cards(report: Report, text: TextResult) -> list[Card]:
    noise, name = noise_of(report, text.name), one_line(text.name, 40)
    floor = "" if noise is None else f"; noise floor {small(noise.kl)}"
    other = "" if noise is None else f"; with itself {percent(1 - noise.disagreement)}"
    was = f"was {perplexity(text.baseline_perplexity.value)}, {ratio(text)}"
    return [
        Card("perplexity", perplexity(text.perplexity.value), was),
        Card("KL divergence", small(text.kl.mean.value), f"nats a token on {name}{floor}"),
        Card("same top token", percent(text.agreement.value), f"of tokens on {name}{other}"),
    ]


def _tasks_card(report: Report) -> Card:
    """Tasks together, in the gate's own terms: every item counts the same."""
    before, change = pooled(report.tasks)
    count, items = len(report.tasks), sum(task.items for task in report.tasks)
    over = f"{items:,} items of {count} task{'s' if count != 1 else ''}"
    return Card("tasks, points", points(change, 2), f"was {percent(before)}, now {percent(before + change)}; {over}")
