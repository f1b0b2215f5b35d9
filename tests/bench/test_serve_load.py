"""Closed and open loops on a scripted `ask`: how many are under way, when they are sent, and when it ends."""

import asyncio
from collections.abc import Iterator
from itertools import count, islice
from time import perf_counter

from quantlab.bench.serve_client import Body, Outcome
from quantlab.bench.serve_load import Loaded, arrival_times, put_load
from quantlab.bench.serve_options import Level


class Scripted:
    """Answers after `seconds`, and remembers how many were under way."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.under_way = self.most = 0

    async def __call__(self, body: Body, due: float) -> Outcome:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        outcome = Outcome(due, sent=perf_counter())
        await asyncio.sleep(self.seconds)
        outcome.last = perf_counter()
        self.under_way -= 1
        return outcome


def bodies() -> Iterator[Body]:
    return ({"number": number} for number in count())


def load(level: Level, ask: Scripted, requests: int, seconds: float | None = None) -> Loaded:
    return asyncio.run(put_load(level, bodies(), requests, seconds, ask))


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    ask = Scripted(0.01)
    assert len(load(Level(concurrency=4), ask, 18).outcomes) == 18
    assert ask.most == 4


def test_fewer_requests_than_workers() -> None:
    ask = Scripted(0.001)
    assert len(load(Level(concurrency=64), ask, 3).outcomes) == 3
    assert ask.most == 3


def test_an_open_loop_does_not_wait_for_answers() -> None:
    ask = Scripted(0.3)
    loaded = load(Level(rate=400), ask, 40)
    assert len(loaded.outcomes) == 40
    assert ask.most > 20  # a closed loop of any usual size would hold them back


def test_time_ends_a_load_and_what_was_sent_is_waited_for() -> None:
    for level in (Level(concurrency=2), Level(rate=100)):
        loaded = load(level, Scripted(0.05), 10_000, seconds=0.2)
        assert 1 <= len(loaded.outcomes) < 60
        assert all(outcome.last <= loaded.ended for outcome in loaded.outcomes)


def test_arrivals_are_a_seeded_poisson_process() -> None:
    found = list(arrival_times(10.0, 50.0, 4000, float("inf")))
    assert found == list(arrival_times(10.0, 50.0, 4000, float("inf")))
    gaps = [after - before for before, after in zip([10.0, *found], found, strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert abs(mean * 50 - 1) < 0.1 and abs(spread / mean - 1) < 0.1  # exponential: deviation equals mean
    assert list(islice(arrival_times(0.0, 1.0, 5, 0.0), 5)) == []
