"""The tasks of one evaluation as `eval.run` wants them: asked of the baseline, then of the candidate.

Apart from `eval.run` because the harness is an extra: only who asks for tasks imports this module.
Knows nothing about how an item is asked or kept.
"""

from collections.abc import Callable, Mapping

from quantlab.eval.answers import Answers
from quantlab.eval.measure import Tick
from quantlab.eval.options import TaskOptions
from quantlab.eval.result import TaskNoise, TaskResult
from quantlab.eval.setup import Setup
from quantlab.eval.task_set import TaskSet, load_tasks
from quantlab.eval.task_stage import BaselineTasks, Runner, baseline_tasks, candidate_tasks
from quantlab.models.decoder import CausalLM


class HarnessStage:
    """Tasks ready to be asked, and what the baseline did on them."""

    def __init__(self, tasks: TaskSet):
        self._tasks = tasks
        self._baseline: BaselineTasks | None = None

    @property
    def metrics(self) -> Mapping[str, str]:
        """The metric of each task."""
        return self._tasks.metrics

    def baseline(self, setup: Setup, model: Callable[[], CausalLM], tick: Tick) -> tuple[tuple[TaskNoise, ...], bool]:
        """Ask the baseline what the cache does not know; returns its noise, and whether the cache knew all."""
        identity = setup.baseline.weights, setup.baseline.tokenizer
        found = baseline_tasks(self._tasks, model, identity, _runner(setup), setup.options.cache, tick)
        self._baseline = found
        return found.noise, found.cached

    def candidate(self, setup: Setup, answers: Answers, tick: Tick) -> tuple[TaskResult, ...]:
        """Ask the candidate the same, and compare."""
        assert self._baseline is not None, "the baseline comes first"
        alpha = setup.options.gate.alpha
        return candidate_tasks(self._tasks, answers, self._baseline, alpha, _runner(setup), tick)


def load_stage(asked: TaskOptions) -> HarnessStage:
    """The tasks of `asked`, their data read and prompts built; raises UsageError for what is missing or not allowed."""
    return HarnessStage(load_tasks(asked))


def _runner(setup: Setup) -> Runner:
    return Runner(setup.tokenizer, setup.place.batch, setup.place.dtype_name, setup.place.machine)
