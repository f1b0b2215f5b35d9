"""Times an engine without a server: single requests, full batches in decode, prompts, and whole workloads.

Every request is random tokens of its own and ends by its length alone. Knows nothing about how engines are built.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from quantlab.runtime.engine import Engine
from quantlab.runtime.request import Request, SamplingParams
from quantlab.runtime.weights import Weights

WARM_STEPS = 8


@dataclass(frozen=True, slots=True)
class Decode:
    """A decode step of `sequences` at `context` tokens each: median seconds, tokens a second."""

    sequences: int
    context: int
    step_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.sequences / self.step_seconds


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests at once: output tokens a second, and seconds to each request's first token (median and longest)."""

    requests: int
    prompt: int
    output: int
    seconds: float
    ttft_median: float
    ttft_longest: float
    preemptions: int

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.requests * self.output / self.seconds


class Prompts:
    """Random prompts, no two alike."""

    def __init__(self, vocab_size: int):
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._made = 0

    def requests(self, count: int, prompt: int, output: int) -> list[Request]:
        """`count` greedy requests of `prompt` tokens for exactly `output` more."""
        params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        made = []
        for _ in range(count):
            self._made += 1
            made.append(
                Request(str(self._made), tuple(self._random.choices(range(self._vocab_size), k=prompt)), params)
            )
        return made


def time_decode(engine: Engine, prompts: Prompts, sequences: int, context: int, steps: int) -> Decode:
    """The median step once all sequences decode; their mean context is `context` in the middle of the steps."""
    start_decode(engine, prompts, sequences, context, steps)
    times, before = [], time.perf_counter()
    for _ in range(steps):
        engine.step()
        now = time.perf_counter()
        times.append(now - before)
        before = now
    assert engine.stats().running == sequences, "a sequence ended while steps were timed"
    run_out(engine)
    # The mean would count a step that the host lost; the median of many is what a reader waits for.
    return Decode(sequences, context, sorted(times)[len(times) // 2])


def start_decode(engine: Engine, prompts: Prompts, sequences: int, context: int, steps: int) -> None:
    """Bring `sequences` as far that each decodes, for `steps` steps at least, and warm up."""
    filling = (
        sequences * context // engine.info.max_batch_tokens + 2
    )  # steps that the first ones decode before the last
    prompt = max(1, context - WARM_STEPS - (steps + filling) // 2)
    _add(engine, prompts.requests(sequences, prompt, 2 * (WARM_STEPS + filling) + steps))
    started: set[str] = set()
    while len(started) < sequences:
        started |= {event.request_id for event in engine.step()}
    for _ in range(WARM_STEPS):
        engine.step()


def time_first_token(engine: Engine, prompts: Prompts, prompt: int, repeats: int = 3) -> float:
    """Median seconds from handing an idle engine a prompt until its first token is on the host."""
    times = []
    for _ in range(repeats):
        _add(engine, prompts.requests(1, prompt, 1))
        begin = time.perf_counter()
        while not any(event.token_ids for event in engine.step()):
            pass
        times.append(time.perf_counter() - begin)
        run_out(engine)
    return sorted(times)[len(times) // 2]


def time_prefill(engine: Engine, prompts: Prompts, count: int, prompt: int) -> float:
    """Prompt tokens a second of `count` prompts that want one token each, the better of two runs behind a first one."""
    time_workload(engine, prompts, count, prompt, 1)
    return max(count * prompt / time_workload(engine, prompts, count, prompt, 1).seconds for _ in range(2))


def time_workload(engine: Engine, prompts: Prompts, count: int, prompt: int, output: int) -> Workload:
    """`count` requests that are all there at the start."""
    before = engine.stats().preemptions
    _add(engine, prompts.requests(count, prompt, output))
    first: dict[str, float] = {}
    begin = time.perf_counter()
    while engine.has_work:
        for event in engine.step():
            first.setdefault(event.request_id, time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    waits = sorted(first.values())
    preemptions = engine.stats().preemptions - before
    return Workload(count, prompt, output, seconds, waits[len(waits) // 2], waits[-1], preemptions)


def step_bytes(weights: Weights, sequences: int, context: int, kv_token_bytes: int) -> int:
    """Bytes that a decode step must read: every weight but the embedding once, and all keys and values."""
    return sum(layer.nbytes for _, layer in weights.linears()) + sequences * context * kv_token_bytes


@dataclass(frozen=True, slots=True)
class Profile:
    """What the device did during some decode steps: share of time idle, microseconds a step by kernel and by gap.

    kernels: name -> microseconds in which no kernel that began earlier ran, and launches, a step. gaps: idle
    microseconds a step between two kernels, as `A -> B`.
    """

    idle: float
    step_us: float
    kernels: dict[str, tuple[float, float]]
    gaps: dict[str, float]


def profile_decode(engine: Engine, prompts: Prompts, sequences: int, context: int, steps: int = 12) -> Profile:
    """The device's own account of `steps` decode steps; idle is what no kernel covers from the first to the last."""
    start_decode(engine, prompts, sequences, context, steps)
    found = _profile(engine.step, steps)
    run_out(engine)
    return found


def profile_prefill(engine: Engine, prompts: Prompts, count: int, prompt: int) -> Profile:
    """The same of `count` prompts that want one token each, all of their steps counted as one."""
    time_workload(engine, prompts, count, prompt, 1)
    _add(engine, prompts.requests(count, prompt, 1))
    return _profile(lambda: run_out(engine), 1)


def _profile(act: Callable[[], object], times: int) -> Profile:
    """What the device did while `act` was called so many times, for each of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            act()
        torch.cuda.synchronize()
    ranges = [(e.time_range, e.name) for e in profiler.events() if str(e.device_type).endswith("CUDA")]
    return account([(time.start, time.end, name) for time, name in ranges], times)


def account(spans: Sequence[tuple[float, float, str]], steps: int) -> Profile:
    """What spans of time (begin, end, kernel), in microseconds, say about each of `steps` steps.

    Kernels that begin early and wait overlap the ones that they wait for, so a moment counts for the earliest alone.
    """
    kernels: dict[str, tuple[float, float]] = {}
    gaps: dict[str, float] = {}
    ordered = sorted(spans)
    if not ordered:
        return Profile(0.0, 0.0, {}, {})
    begin = end = ordered[0][0]
    before = ""
    for start, stop, name in ordered:
        if start > end:
            gap = f"{before} -> {name}"
            gaps[gap] = gaps.get(gap, 0.0) + (start - end) / steps
        alone, launches = kernels.get(name, (0.0, 0.0))
        kernels[name] = alone + max(0.0, stop - max(start, end)) / steps, launches + 1 / steps
        if stop > end:
            end, before = stop, name
    length = max((end - begin) / steps, 1e-9)
    return Profile(sum(gaps.values()) / length, length, kernels, gaps)


def run_out(engine: Engine) -> None:
    """Step until nothing is left."""
    while engine.has_work:
        engine.step()


def _add(engine: Engine, requests: Iterable[Request]) -> None:
    for request in requests:
        engine.add(request)
