"""Two results side by side, such as those of two recipes; refused where they were not measured alike.

Imports no torch. Knows nothing about files or how a table is drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quantlab.errors import UsageError
from quantlab.eval.result import Protocol, Report, TaskResult, TextResult

MEANINGS = {
    "name": "the protocol",
    "text": "the text",
    "tokenizer": "the tokenizer",
    "bos": "the tokens before the text",
    "window": "the window",
    "tokens": "the number of tokens",
    "words": "the number of words",
    "bytes": "the number of bytes",
    "dtype": "the dtype",
    "digest": "the digest",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one text or task in both results; `digits` is how many are worth showing after the point."""

    where: str
    figure: str
    before: float
    after: float
    digits: int


def compare_reports(before: Report, after: Report) -> list[Change]:
    """Every figure that both results have of the same text or task, in the order of `after`.

    Raises UsageError where the baselines differ, where a text or task of one name was measured by two protocols or on
    two sets of items, and where nothing is common to both.
    """
    if before.baseline.weights != after.baseline.weights:
        raise UsageError(f"measured against two baselines: {before.baseline.path} and {after.baseline.path}")
    changes = [*_texts(before, after), *_tasks(before, after)]
    if not changes:
        raise UsageError("the two results have no text and no task in common")
    return changes


def check_comparable(one: Protocol, other: Protocol, text: str) -> None:
    """Raises UsageError, naming what differs, unless both scored `text` by the same protocol."""
    if one != other:
        fields = [meaning for name, meaning in MEANINGS.items() if getattr(one, name) != getattr(other, name)]
        told = ", ".join(field for field in fields if field != MEANINGS["digest"]) or MEANINGS["digest"]
        message = f"'{text}' was scored in two ways, which are never compared; different: {told}"
        raise UsageError(message, fix="measure both with the same options")


def _texts(before: Report, after: Report) -> Iterator[Change]:
    known: dict[str, TextResult] = {text.name: text for text in before.texts}
    for text in after.texts:
        if (old := known.get(text.name)) is None:
            continue
        check_comparable(old.protocol, text.protocol, text.name)
        yield Change(text.name, f"perplexity {text.protocol.name}", old.perplexity.value, text.perplexity.value, 3)
        yield Change(text.name, "KL divergence, mean nats", old.kl.mean.value, text.kl.mean.value, 5)
        yield Change(text.name, "KL divergence, 99.9 %", old.kl.p999, text.kl.p999, 3)
        yield Change(text.name, "same top token, %", 100 * old.agreement.value, 100 * text.agreement.value, 2)


def _tasks(before: Report, after: Report) -> Iterator[Change]:
    known: dict[str, TaskResult] = {task.name: task for task in before.tasks}
    for task in after.tasks:
        if (old := known.get(task.name)) is None:
            continue
        if (old.data, old.metric) != (task.data, task.metric):
            raise UsageError(f"'{task.name}' was asked on different items, so the answers cannot be compared")
        yield Change(task.name, f"{task.metric}, %", 100 * old.candidate.value, 100 * task.candidate.value, 2)
