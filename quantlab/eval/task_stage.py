"""The tasks of one evaluation: the baseline on them, from the cache where it can be, a candidate, and both compared.

Knows nothing about texts, gates or reports, nor how a model is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.eval.answers import Answers, PlainAnswers, task_rows
from quantlab.eval.likelihood import Progress
from quantlab.eval.outcome_cache import TaskEntry, TaskKey, load_entry, store_entry
from quantlab.eval.outcomes import TaskOutcome, compare_tasks, task_noise
from quantlab.eval.result import Digest, TaskNoise, TaskResult
from quantlab.eval.task_set import TaskSet
from quantlab.eval.tasks import run_tasks
from quantlab.models.decoder import CausalLM
from quantlab.text import Tokenizer

NOISE_ITEMS = 200  # of each task, asked again to see how many answers are noise


@dataclass(frozen=True, slots=True)
class Runner:
    """How models run here: `windows` in one forward pass as for text; dtype and machine are part of the cache's key."""

    tokenizer: Tokenizer
    windows: int
    dtype: str
    machine: str

    @property
    def rows(self) -> int:
        """Rows of tasks in one forward pass."""
        return task_rows(self.windows)


@dataclass(frozen=True, slots=True)
class BaselineTasks:
    """The baseline's outcome and noise by task, and whether all of them were in the cache."""

    outcomes: dict[str, TaskOutcome]
    noise: tuple[TaskNoise, ...]
    cached: bool


def baseline_tasks(
    tasks: TaskSet,
    model: Callable[[], CausalLM],
    identity: tuple[Digest, Digest],
    runner: Runner,
    cache: Path | None,
    on_progress: Progress,
) -> BaselineTasks:
    """The baseline on every task; `model` is called, and so loaded, only for what the cache does not hold.

    `identity` is the digests of its weights and its tokenizer. `on_progress` counts requests.
    """
    machine = f"{runner.machine}, {runner.rows} rows together"
    weights, tokenizer = identity
    keys = {
        name: TaskKey(weights=weights, tokenizer=tokenizer, data=data, dtype=runner.dtype, machine=machine)
        for name, data in tasks.digests.items()
    }
    held = {name: load_entry(cache, key) if cache is not None else None for name, key in keys.items()}
    found = {name: entry for name, entry in held.items() if entry is not None}
    missing = tasks.only([name for name in keys if name not in found])
    if missing.tasks:
        for name, entry in _run(missing, model(), keys, runner, on_progress).items():
            found[name] = entry
            if cache is not None:
                store_entry(cache, entry)
    ordered = {name: found[name] for name in keys}
    outcomes = {name: entry.outcome for name, entry in ordered.items()}
    return BaselineTasks(outcomes, tuple(entry.noise for entry in ordered.values()), not missing.tasks)


def candidate_tasks(
    tasks: TaskSet, answers: Answers, baseline: BaselineTasks, alpha: float, runner: Runner, on_progress: Progress
) -> tuple[TaskResult, ...]:
    """The candidate on every task, against the baseline; `alpha` is the gate's."""
    outcomes = run_tasks(answers, runner.tokenizer, tasks, on_progress)
    return tuple(compare_tasks(baseline.outcomes[name], outcome, alpha) for name, outcome in outcomes.items())


def _run(
    tasks: TaskSet, model: CausalLM, keys: dict[str, TaskKey], runner: Runner, on_progress: Progress
) -> dict[str, TaskEntry]:
    """The baseline asked, and its first items asked again with twice as many rows together."""
    few = tasks.first(NOISE_ITEMS)
    once, again = tasks.requests, few.requests
    rows, twice = PlainAnswers(model, runner.rows), PlainAnswers(model, 2 * runner.rows)
    first = run_tasks(rows, runner.tokenizer, tasks, lambda done, _: on_progress(done, once + again))
    second = run_tasks(twice, runner.tokenizer, few, lambda done, _: on_progress(once + done, once + again))
    return {
        name: TaskEntry(key=keys[name], outcome=outcome, noise=task_noise(outcome, second[name]))
        for name, outcome in first.items()
    }
