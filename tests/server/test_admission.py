"""Who may come in, told in numbers alone."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from quantlab.runtime.options import EngineStats
from quantlab.server.admission import Admission, QueueFull, QueueLimits


@dataclass
class World:
    stats: EngineStats = field(default_factory=EngineStats)
    now: float = 0.0

    def admission(self, requests: int = 2, tokens: int = 100, slots: int = 3) -> Admission:
        made = Admission(QueueLimits(requests, tokens), lambda: self.stats, lambda: self.now)
        made.slots = slots
        return made


def test_what_can_run_and_what_may_wait_comes_in() -> None:
    admission = World().admission()
    with ExitStack() as places:
        for _ in range(5):
            places.enter_context(admission.enter(1))
        with pytest.raises(QueueFull, match="2 requests wait already, of 2"), admission.enter(1):
            pass
        assert (admission.requests, admission.sequences) == (5, 5)


def test_a_place_is_free_again_at_the_end() -> None:
    admission = World().admission(requests=1, slots=1)
    with admission.enter(1), admission.enter(1), pytest.raises(QueueFull), admission.enter(1):
        pass
    with admission.enter(2):
        assert admission.sequences == 2
    assert admission.requests == 0


def test_an_engine_that_cannot_run_more_makes_the_queue_begin_sooner() -> None:
    world = World(EngineStats(running=1, waiting=1))
    admission = world.admission(requests=2, slots=64)
    with ExitStack() as places:
        for _ in range(3):
            places.enter_context(admission.enter(1))
        with pytest.raises(QueueFull, match="2 requests wait"), admission.enter(1):
            pass


def test_a_request_of_many_answers_comes_in_when_nothing_else_is_there() -> None:
    admission = World().admission(requests=1, slots=1)
    with admission.enter(50):
        assert admission.sequences == 50


def test_tokens_of_prompts_wait_only_so_many() -> None:
    admission = World().admission(requests=9, tokens=100)
    with admission.enter(1) as first, admission.enter(1) as second, admission.enter(1) as third:
        admission.count(first, 90)
        admission.count(second, 10)
        with pytest.raises(QueueFull, match="100 tokens wait already") as full:
            admission.count(third, 1)
        assert full.value.reason == "queue_tokens"
        admission.start(first)
        admission.count(third, 90)
        assert admission.waiting_tokens == 100


def test_a_prompt_longer_than_the_limit_comes_in_alone() -> None:
    admission = World().admission(tokens=100)
    with admission.enter(2) as ticket:
        admission.count(ticket, 1000)
        assert admission.waiting_tokens == 1000


def test_come_again_when_the_queue_is_gone_at_the_pace_of_late() -> None:
    world = World()
    admission = world.admission(requests=10, slots=2)
    for _ in range(5):
        with admission.enter(1):
            world.now += 2.0
    with ExitStack() as places:
        for _ in range(12):
            places.enter_context(admission.enter(1))
        with pytest.raises(QueueFull) as full, admission.enter(1):
            pass
    assert full.value.retry_after == 20  # ten wait, one ends every two seconds
