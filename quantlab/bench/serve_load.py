"""Puts a load on a server: so many requests under way at once, or so many arriving each second.

Knows nothing about what a request asks or what is made of the outcomes.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

from quantlab.bench.serve_client import Body, Outcome
from quantlab.bench.serve_options import Level

Ask = Callable[[Body, float], Awaitable[Outcome]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a level's requests became, in the order of their end; `began` and `ended` in seconds of `perf_counter`."""

    outcomes: list[Outcome]
    began: float
    ended: float


async def put_load(level: Level, bodies: Iterator[Body], count: int, seconds: float | None, ask: Ask) -> Loaded:
    """Send `count` requests, fewer if `seconds` pass first; waits for the end of all that were sent."""
    began = perf_counter()
    stop = began + (seconds if seconds is not None else float("inf"))
    outcomes: list[Outcome] = []
    if level.concurrency is not None:
        await _closed(level.concurrency, bodies, count, stop, ask, outcomes)
    else:
        arrivals = arrival_times(began, level.rate or 1.0, count, stop)
        await _open(arrivals, bodies, ask, outcomes)
    return Loaded(outcomes, began, perf_counter())


def arrival_times(began: float, rate: float, count: int, stop: float, seed: int = 0) -> Iterator[float]:
    """A Poisson process: at most `count` times from `began` until `stop`, `rate` a second on average."""
    draw = random.Random(f"arrivals {seed} {rate}")
    at = began
    for _ in range(count):
        at += draw.expovariate(rate)
        if at > stop:
            return
        yield at


async def _closed(
    concurrency: int, bodies: Iterator[Body], count: int, stop: float, ask: Ask, outcomes: list[Outcome]
) -> None:
    """`concurrency` workers, each of which asks again when its answer has ended."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            if perf_counter() >= stop:
                return
            outcomes.append(await ask(next(bodies), perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, count)):
            group.create_task(work())


async def _open(arrivals: Iterator[float], bodies: Iterator[Body], ask: Ask, outcomes: list[Outcome]) -> None:
    """A task for each arrival, sent when it is due whatever the others do."""

    async def send(body: Body, due: float) -> None:
        outcomes.append(await ask(body, due))

    async with asyncio.TaskGroup() as group:
        for due in arrivals:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            group.create_task(send(next(bodies), due))
