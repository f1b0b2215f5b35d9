"""From two folders to a result: the baseline's stages, the candidate's stages, the verdict. The one IO shell of `eval`.

With the cache one model is in memory at a time: the candidate is compared with the baseline's final states on disk, by
way of its output layer. Without it, and for a baseline too wide to keep, both models are in memory and run side by side
on text. Holds no maths and writes nothing but the cache.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import nn

from quantlab import __version__
from quantlab.checkpoint.load import load_head, load_model
from quantlab.clock import Clock
from quantlab.errors import QuantlabError
from quantlab.eval.answers import Answers, PlainAnswers, task_rows
from quantlab.eval.corpus import BUNDLED
from quantlab.eval.distribution import text_noise, text_result
from quantlab.eval.facts import layer_errors, machine
from quantlab.eval.gate import check_measurable, judge
from quantlab.eval.measure import Side, Tick, model_side, score_noise, score_windows
from quantlab.eval.metrics import available
from quantlab.eval.options import EvalOptions, ServedOptions
from quantlab.eval.protocol import Windows
from quantlab.eval.reference import MAX_BYTES_A_TOKEN, Key, build_reference, bytes_a_token, open_reference
from quantlab.eval.result import NoiseFloor, Report, ServedFacts, TaskNoise, TaskResult, TextNoise, TextResult
from quantlab.eval.served import load_answers, load_served, served_facts, served_side, told_of_length
from quantlab.eval.setup import Place, Setup, prepare, text_names
from quantlab.events import Listener, Notice, StepDone
from quantlab.models.decoder import CausalLM


@dataclass
class Model:
    """A model that is loaded when it is first needed."""

    folder: Path
    place: Place
    clock: Clock
    whole: CausalLM | None = None
    output: nn.Module | None = None

    def get(self) -> CausalLM:
        """The whole model."""
        if self.whole is None:
            with self.clock.stage("load models"):
                self.whole = load_model(self.folder, self.place.dtype, self.place.device)
        return self.whole

    def head(self) -> nn.Module:
        """Its output layer, read alone unless the model is there."""
        if self.output is None:
            with self.clock.stage("load models"):
                whole = self.whole
                self.output = whole.lm_head if whole else load_head(self.folder, self.place.dtype, self.place.device)
        return self.output


class TaskStage(Protocol):
    """Tasks ready to be asked; a protocol, since what asks them is an extra that need not be installed."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """The metric of each task."""

    def baseline(self, setup: Setup, model: Callable[[], CausalLM], tick: Tick) -> tuple[tuple[TaskNoise, ...], bool]:
        """Ask the baseline, which `model` loads, what the cache does not know; its noise, and whether it knew all."""

    def candidate(self, setup: Setup, answers: Answers, tick: Tick) -> tuple[TaskResult, ...]:
        """Ask the candidate the same."""


@dataclass
class Baseline:
    """The baseline's side of every text by name, the noise of everything, and whether all of it was in the cache."""

    sides: dict[str, Side] = field(default_factory=dict)
    text_noise: list[TextNoise] = field(default_factory=list)
    task_noise: tuple[TaskNoise, ...] = ()
    cached: bool = True


@dataclass(frozen=True)
class Candidate:
    """What the candidate gave, and how it ran if as served."""

    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...] = ()
    served: ServedFacts | None = None


def evaluate(options: EvalOptions, tasks: TaskStage | None, listener: Listener) -> Report:
    """Carry out `options`, and `tasks` if there are any; raises a QuantlabError for whatever stands in the way."""
    check_measurable(options.gate, available(text_names(options.text), tasks.metrics if tasks else {}))
    started, clock = time.perf_counter(), Clock()
    with clock.stage("prepare"):
        setup = prepare(options)
        layers = layer_errors(options.candidate)
    if any(source.name == BUNDLED for source in options.text.sources):
        listener(Notice("no --text given: scoring the text that comes with quantlab"))
    baseline = run_baseline(setup, tasks, clock, listener)
    found = run_candidate(setup, baseline, tasks, clock, listener)
    batches = setup.place.batch, 2 * setup.place.batch
    noise = NoiseFloor(batch_sizes=batches, texts=tuple(baseline.text_noise), tasks=baseline.task_noise)
    return Report(
        quantlab=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(setup.place.device),
        baseline=setup.baseline,
        candidate=setup.candidate,
        baseline_from_cache=baseline.cached,
        texts=found.texts,
        tasks=found.tasks,
        noise=noise,
        layers=layers,
        gate=judge(options.gate, found.texts, found.tasks, noise),
        served=found.served,
        seconds=rounded({**clock.stages, "total": time.perf_counter() - started}),
    )


def run_baseline(setup: Setup, tasks: TaskStage | None, clock: Clock, listener: Listener) -> Baseline:
    """The baseline on every text and task, from the cache where it can be.

    The model is dropped at the end, unless a text's side is not cached: such a side runs it again beside the candidate.
    """
    model, found = Model(setup.options.baseline, setup.place, clock), Baseline()
    for name, windows in setup.texts.items():
        side, noise, cached = _baseline_text(setup, model, windows, _ticker(f"baseline {name}", listener), listener)
        found.sides[name] = side
        found.text_noise.append(noise.model_copy(update={"name": name}))
        found.cached &= cached
    if tasks is not None:
        with clock.stage("baseline on tasks"):
            found.task_noise, cached = tasks.baseline(setup, model.get, _ticker("baseline tasks", listener))
        found.cached &= cached
    return found


def run_candidate(
    setup: Setup, baseline: Baseline, tasks: TaskStage | None, clock: Clock, listener: Listener
) -> Candidate:
    """The candidate beside the baseline on every text and task."""
    if setup.options.served is not None:
        return _run_served(setup, setup.options.served, baseline, tasks, clock, listener)
    model = Model(setup.options.candidate, setup.place, clock).get()
    texts = candidate_texts(setup, baseline, lambda windows: model_side(model, windows), clock, listener)
    if tasks is None:
        return Candidate(texts)
    answers = PlainAnswers(model, task_rows(setup.place.batch))
    return Candidate(texts, candidate_on_tasks(setup, tasks, answers, clock, listener))


def _run_served(
    setup: Setup,
    asked: ServedOptions,
    baseline: Baseline,
    tasks: TaskStage | None,
    clock: Clock,
    listener: Listener,
) -> Candidate:
    """The candidate as it is served: texts through the engine's forward pass, tasks through the whole engine."""
    with clock.stage("load models"):
        model = load_served(setup, asked)
    facts = served_facts(model, asked, setup.place.dtype_name)
    texts = candidate_texts(setup, baseline, partial(served_side, model), clock, listener)
    del model  # an engine takes its own memory
    if tasks is None:
        return Candidate(texts, served=facts)
    with clock.stage("load models"):
        answers = load_answers(setup, asked)
    if told := told_of_length(setup, answers):
        listener(Notice(told))
    return Candidate(texts, candidate_on_tasks(setup, tasks, answers, clock, listener), facts)


def candidate_on_tasks(
    setup: Setup, tasks: TaskStage, answers: Answers, clock: Clock, listener: Listener
) -> tuple[TaskResult, ...]:
    """Every task asked of the candidate."""
    with clock.stage("candidate on tasks"):
        return tasks.candidate(setup, answers, _ticker("candidate tasks", listener))


def candidate_texts(
    setup: Setup, baseline: Baseline, side: Callable[[Windows], Side], clock: Clock, listener: Listener
) -> tuple[TextResult, ...]:
    """Every text scored with the candidate's side of it beside the baseline's states."""
    results = []
    for name, windows in setup.texts.items():
        tick = _ticker(f"candidate {name}", listener)
        with clock.stage("candidate on text"):
            scores = score_windows(windows, baseline.sides[name], side(windows), setup.place.batch, tick)
        results.append(text_result(name, windows.protocol, scores, windows.lengths))
    return tuple(results)


def _baseline_text(
    setup: Setup, model: Model, windows: Windows, tick: Tick, listener: Listener
) -> tuple[Side, TextNoise, bool]:
    """The baseline's side of one text, its noise, and whether both were in the cache."""
    cache, batch = setup.options.cache, setup.place.batch
    if cache is not None:
        width = bytes_a_token(model.head(), setup.place.dtype)
        if width <= MAX_BYTES_A_TOKEN:
            return _cached_text(setup, cache, model, windows, tick, listener)
        told = (
            f"the baseline's states take {width:,} bytes a token, more than are kept: it runs again for every candidate"
        )
        listener(Notice(told))
    side, whole = model_side(model.get(), windows), model.get()
    with model.clock.stage("baseline on text"):
        return side, text_noise("", score_noise(whole, windows, side, batch)), False


def _cached_text(
    setup: Setup, cache: Path, model: Model, windows: Windows, tick: Tick, listener: Listener
) -> tuple[Side, TextNoise, bool]:
    """The same by way of the cache, which is filled first if it does not hold exactly this."""
    place, head = setup.place, model.head()
    key = Key(
        weights=setup.baseline.weights,
        tokenizer=setup.baseline.tokenizer,
        protocol=windows.protocol.digest,
        machine=f"{place.machine}, {place.batch} windows together",
    )
    with model.clock.stage("read cache"):
        reference = open_reference(cache, key, windows, head)
    cached = reference is not None
    if reference is None:
        if key.folder(cache).exists():
            listener(Notice(f"the cached baseline in {key.folder(cache)} is damaged: made again"))
        whole = model.get()
        with model.clock.stage("baseline on text"):
            build_reference(cache, key, windows, whole, place.batch, tick)
        reference = open_reference(cache, key, windows, head)
    if reference is None:
        raise QuantlabError("what was just written to the cache cannot be read back", where=str(key.folder(cache)))
    return Side(reference.states, head), reference.facts.noise, cached


def _ticker(stage: str, listener: Listener) -> Callable[[int, int], None]:
    return lambda done, total: listener(StepDone(stage, done, total))


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds are enough for a result file."""
    return {name: round(value, 3) for name, value in seconds.items()}
