"""What a gate can speak of: the name of every measured quantity, and what is known of it.

Text fields stand alone (`kl.mean`: every text) or behind a text's name (`text.wikitext.kl.mean`); a task's accuracy is
`task.piqa`, all tasks' items together are `tasks.accuracy`. Knows nothing about limits and verdicts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantlab.errors import did_you_mean
from quantlab.eval.result import Estimate, NoiseFloor, TaskResult, TextNoise, TextResult

TEXT_FIELDS = (
    "ppl_ratio", "perplexity", "bits_per_byte_increase",
    "kl.mean", "kl.median", "kl.p90", "kl.p95", "kl.p99", "kl.p999", "kl.maximum",
    "agreement", "delta_p.mean", "delta_p.rms",
)  # fmt: skip
POOLED = ("tasks.accuracy", "tasks.flips")


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its standard error; if `logarithm`, of the logarithm of what people read.

    `same` is its value for a candidate that equals the baseline, `noise` how far from it noise alone has gone.
    """

    estimate: Estimate
    same: float | None = None
    noise: float | None = None
    logarithm: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """An order statistic of this very text: a number without an error."""

    value: float


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `items`; `noise` is the share that noise alone has given."""

    count: int
    items: int
    noise: float | None = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """The same items answered by both models; `noise` is the share of items whose answers flip by noise alone."""

    right_to_wrong: int
    wrong_to_right: int
    items: int
    right: int  # of the candidate
    noise: float | None = None

    @property
    def loss(self) -> float:
        """Baseline's accuracy minus the candidate's, a share."""
        return (self.right_to_wrong - self.wrong_to_right) / self.items

    @property
    def flip_rate(self) -> float:
        """The share of items whose answer changed between right and wrong."""
        return (self.right_to_wrong + self.wrong_to_right) / self.items


Quantity = Mean | Order | Share | Pairs


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured quantity, its full name first among the names that a gate may call it by."""

    names: tuple[str, ...]
    quantity: Quantity


def measured(texts: Sequence[TextResult], tasks: Sequence[TaskResult], noise: NoiseFloor | None) -> list[Metric]:
    """Everything that was measured, texts first."""
    floors = {floor.name: floor for floor in noise.texts} if noise else {}
    metrics = [
        Metric(text_names(text.name, field), quantity)
        for text in texts
        for field, quantity in _text_quantities(text, floors.get(text.name)).items()
    ]
    found = [(task, _pairs(task, noise)) for task in tasks]
    for task, pairs in found:
        metrics += _task_metrics(task_names(task.name, task.metric), pairs)
    if found:
        metrics += _task_metrics((("tasks.accuracy",), ("tasks.flips",)), _pooled([pairs for _, pairs in found], noise))
    return metrics


def available(texts: Iterable[str], tasks: Mapping[str, str]) -> list[str]:
    """Every name that a gate may use when these texts and tasks (name -> its accuracy metric) will be measured."""
    names = [name for text in texts for field in TEXT_FIELDS for name in text_names(text, field)]
    for task, metric in tasks.items():
        accuracy, flips = task_names(task, metric)
        names += [*accuracy, *flips]
    return list(dict.fromkeys([*names, *(POOLED if tasks else ())]))


def text_names(text: str, field: str) -> tuple[str, ...]:
    """The names of a text's field: its own, every text's, and the short form."""
    return f"text.{text}.{field}", f"text.*.{field}", field


def task_names(task: str, metric: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a task's accuracy and of its flips."""
    fields = dict.fromkeys(("", ".accuracy", f".{metric}"))
    accuracy = tuple(f"task.{name}{field}" for name in (task, "*") for field in fields)
    return accuracy, (f"task.{task}.flips", "task.*.flips")


def is_accuracy(name: str) -> bool:
    """Whether a name speaks of accuracy, which both models have on the same items."""
    return name == "tasks.accuracy" or (name.startswith("task.") and not name.endswith(".flips"))


def is_share(name: str) -> bool:
    """Whether a name speaks of a share of items or tokens."""
    return is_accuracy(name) or name.split(".")[-1] in ("flips", "agreement")


def is_ratio(name: str) -> bool:
    """Whether a name speaks of a ratio, which is judged by its logarithm."""
    return name.split(".")[-1] == "ppl_ratio"


def problem_with(name: str) -> str | None:
    """Why no measurement will ever have this name; None if one could."""
    prefix, _, rest = name.partition(".")
    field = next((field for field in TEXT_FIELDS if rest.endswith(f".{field}") and prefix == "text"), None)
    if name in TEXT_FIELDS or name in POOLED or (prefix == "task" and rest) or field:
        return None
    known = [*TEXT_FIELDS, *POOLED, "task.*", *(f"text.*.{field}" for field in TEXT_FIELDS)]
    return f"unknown metric '{name}'{did_you_mean(name, known)}"


def _text_quantities(text: TextResult, floor: TextNoise | None) -> dict[str, Quantity]:
    bits = text.protocol.tokens / text.protocol.bytes / math.log(2.0)
    ratio_floor, kl_floor, other_floor = (
        (abs(floor.log_ratio), floor.kl, floor.disagreement) if floor else (None, None, None)
    )
    orders = {
        f"kl.{name}": Order(getattr(text.kl, name)) for name in ("median", "p90", "p95", "p99", "p999", "maximum")
    }
    return {
        "ppl_ratio": Mean(text.log_ratio, 0.0, ratio_floor, logarithm=True),
        "perplexity": Mean(text.perplexity),
        "bits_per_byte_increase": Mean(
            scaled(text.log_ratio, bits), 0.0, None if ratio_floor is None else ratio_floor * bits
        ),
        "kl.mean": Mean(text.kl.mean, 0.0, kl_floor),
        **orders,
        "agreement": Mean(text.agreement, 1.0, other_floor),
        "delta_p.mean": Mean(text.delta_p, 0.0),
        "delta_p.rms": Mean(text.delta_p_rms, 0.0),
    }


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in other units."""
    error = None if estimate.standard_error is None else estimate.standard_error * abs(factor)
    return estimate.model_copy(update={"value": estimate.value * factor, "standard_error": error})


def _pairs(task: TaskResult, noise: NoiseFloor | None) -> Pairs:
    right = round(task.candidate.value * task.items)
    return Pairs(task.right_to_wrong, task.wrong_to_right, task.items, right, _flip_noise(noise, task.name))


def _pooled(tasks: Sequence[Pairs], noise: NoiseFloor | None) -> Pairs:
    """All items of all tasks, each counting the same."""
    return Pairs(
        sum(task.right_to_wrong for task in tasks),
        sum(task.wrong_to_right for task in tasks),
        sum(task.items for task in tasks),
        sum(task.right for task in tasks),
        _flip_noise(noise, None),
    )


def _flip_noise(noise: NoiseFloor | None, task: str | None) -> float | None:
    """The share of items that flip by noise alone, in one task or (None) in all."""
    floors = [floor for floor in noise.tasks if task in (None, floor.name)] if noise else []
    items = sum(floor.items for floor in floors)
    return sum(floor.flips for floor in floors) / items if items else None


def _task_metrics(names: tuple[tuple[str, ...], tuple[str, ...]], pairs: Pairs) -> list[Metric]:
    flips = Share(pairs.right_to_wrong + pairs.wrong_to_right, pairs.items, pairs.noise)
    return [Metric(names[0], pairs), Metric(names[1], flips)]
