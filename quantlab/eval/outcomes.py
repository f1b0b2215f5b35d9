"""What models did on a task's items, and two of them compared item by item.

Imports no torch and no harness. Knows nothing about how an item was asked or scored.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quantlab.eval.result import Digest, Flip, Strict, TaskNoise, TaskResult
from quantlab.eval.statistics import (
    clustered_mean,
    difference_interval,
    mcnemar_worse,
    paired_difference,
    smallest_drop,
)

SHOWN_FLIPS = 20
SHOWN_CHARS = 240
POWER = 0.8
ItemDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class TaskOutcome(Strict):
    """One model on the items of one task, in the order of its file: entry i of each tuple is about item i.

    `items` are digests of everything that was asked, `answers` what was chosen or written, `prompts` the ends of the
    prompts.
    """

    task: str
    metric: str
    data: Digest
    items: tuple[ItemDigest, ...]
    right: tuple[Literal[0, 1], ...]
    answers: tuple[str, ...]
    prompts: tuple[str, ...]

    @model_validator(mode="after")
    def _one_entry_an_item(self) -> "TaskOutcome":
        lengths = {len(self.items), len(self.right), len(self.answers), len(self.prompts)}
        if len(lengths) != 1 or not self.items:
            raise ValueError("every item has one entry in each list")
        return self


def compare_tasks(baseline: TaskOutcome, candidate: TaskOutcome, alpha: float) -> TaskResult:
    """The candidate against the baseline on the same items; `alpha` is for the smallest drop that would be found."""
    assert (baseline.data, baseline.items) == (candidate.data, candidate.items), "both answered the same items"
    pairs = list(zip(baseline.right, candidate.right, strict=True))
    lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
    low, high = difference_interval(lost, gained, len(pairs))
    return TaskResult(
        name=baseline.task,
        metric=baseline.metric,
        items=len(pairs),
        data=baseline.data,
        baseline=clustered_mean([[score] for score in baseline.right]),
        candidate=clustered_mean([[score] for score in candidate.right]),
        difference=paired_difference(baseline.right, candidate.right),
        low=low,
        high=high,
        right_to_wrong=lost,
        wrong_to_right=gained,
        answers_changed=sum(a != b for a, b in zip(baseline.answers, candidate.answers, strict=True)),
        mcnemar_p=mcnemar_worse(lost, gained),
        smallest_drop=smallest_drop(len(pairs), (lost + gained) / len(pairs), alpha, POWER),
        flips=_flips(baseline, candidate),
    )


def task_noise(first: TaskOutcome, second: TaskOutcome) -> TaskNoise:
    """One model's two runs on the same items; where one run has fewer, they are the first of the other's."""
    count = min(len(first.items), len(second.items))
    assert first.items[:count] == second.items[:count], "both answered the same items"
    flips = sum(a != b for a, b in zip(first.right[:count], second.right[:count], strict=True))
    return TaskNoise(name=first.task, items=count, flips=flips)


def _flips(baseline: TaskOutcome, candidate: TaskOutcome) -> tuple[Flip, ...]:
    """The first items whose answer changed between right and wrong."""
    changed = [i for i, (a, b) in enumerate(zip(baseline.right, candidate.right, strict=True)) if a != b]
    return tuple(
        Flip(
            index=index,
            prompt=_end(baseline.prompts[index]),
            baseline=_start(baseline.answers[index]),
            candidate=_start(candidate.answers[index]),
            was_right=baseline.right[index] == 1,
        )
        for index in changed[:SHOWN_FLIPS]
    )


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def _end(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else "..." + text[3 - SHOWN_CHARS :]
