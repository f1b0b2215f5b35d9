"""The scheduler: who computes how much in a step, who waits, and who gives way."""

import logging

import pytest

from quantlab.runtime.batch import Batch
from quantlab.runtime.prefixes import WORTH_WAITING
from tests.runtime.scripted import Bench, ask, bench, prompts


def counts(batch: Batch) -> dict[str, int]:
    """Tokens of each request in a step, in order."""
    return {part.sequence.request.request_id: part.count for part in batch.slices}


def stepped(run: Bench) -> dict[str, int]:
    """The next step's counts."""
    run.step()
    return counts(run.runner.batches[-1])


def running(run: Bench) -> list[str]:
    return [sequence.request.request_id for sequence in run.scheduler.running.values()]


def test_a_prompt_longer_than_the_budget_is_computed_in_pieces_beside_tokens_of_others() -> None:
    run = bench(changes={"max_batch_tokens": 8})
    run.add(ask("old", (1, 2, 3), max_tokens=20, ignore_eos=True))
    run.step()
    run.add(ask("long", tuple(range(1, 21)), max_tokens=4, ignore_eos=True))
    assert [stepped(run) for _ in range(4)] == [
        {"old": 1, "long": 7}, {"old": 1, "long": 7}, {"old": 1, "long": 6}, {"old": 1, "long": 1},
    ]  # fmt: skip
    samples = [[part.samples for part in batch.slices] for batch in run.runner.batches]
    assert samples == [[True], [True, False], [True, False], [True, True], [True, True]]


def test_one_token_each_comes_before_any_prompt_and_new_prompts_come_last() -> None:
    run = bench(changes={"max_batch_tokens": 6})
    run.add(ask("long", tuple(range(1, 15)), max_tokens=9, ignore_eos=True))
    run.add(ask("next", (1, 2, 3), max_tokens=9, ignore_eos=True))
    assert [stepped(run) for _ in range(4)] == [
        {"long": 6}, {"long": 6}, {"long": 2, "next": 3}, {"long": 1, "next": 1},
    ]  # fmt: skip


def test_nobody_passes_by_who_came_first_and_does_not_fit() -> None:
    run = bench(changes={"num_blocks": 16})
    run.add(ask("big", (1,) * 40, max_tokens=20, ignore_eos=True))
    for _ in range(3):
        run.step()
    run.add(ask("big too", (2,) * 40, max_tokens=2), ask("small", (3,), max_tokens=2))
    run.step()
    assert running(run) == ["big"]
    run.run()
    assert run.endings("small")


def test_a_sequence_is_admitted_when_each_that_runs_has_a_block_to_spare() -> None:
    run = bench(changes={"num_blocks": 16, "max_batch_tokens": 64})
    run.add(*(ask(str(i), (i + 1,) * 16, max_tokens=8, ignore_eos=True) for i in range(4)))
    run.step()
    # 3 x 4 blocks are held: the fourth needs 4, and 3 more for those that run.
    assert running(run) == ["0", "1", "2"]


@pytest.mark.parametrize(("length", "blocks"), [(16, 8), (32, 16)])
def test_nothing_is_spared_for_who_has_all_blocks_that_it_may_need(length: int, blocks: int) -> None:
    run = bench(
        changes={"block_size": 16, "max_model_len": length, "num_blocks": blocks, "max_batch_tokens": 8 * length}
    )
    requests = [ask(str(i), (i + 1,) * (length - 4), max_tokens=4, ignore_eos=True) for i in range(8)]
    run.add(*requests)
    run.step()
    assert len(running(run)) == 8
    run.run()
    assert not run.engine.stats().preemptions
    run.assert_as_alone(*requests)


def test_there_are_never_more_sequences_than_a_step_has_tokens() -> None:
    run = bench(changes={"max_batch_tokens": 3})
    requests = [ask(str(i), prompt, max_tokens=6) for i, prompt in enumerate(prompts(6))]
    run.add(*requests)
    for _ in range(12):
        run.step()
        assert len(run.scheduler.running) <= 3
    run.run()
    run.assert_as_alone(*requests)


def test_when_blocks_run_out_who_has_computed_least_gives_way_and_comes_back() -> None:
    run = bench(changes={"num_blocks": 10, "max_model_len": 40})
    settings = {"max_tokens": 20, "ignore_eos": True}
    requests = [ask("long", (1,) * 17, **settings), ask("short", (2, 3), **settings)]
    run.add(*requests)
    while not run.engine.stats().preemptions:
        run.step()
    assert running(run) == ["long"]
    run.run()
    run.assert_as_alone(*requests)


def test_a_preemption_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run = bench(changes={"num_blocks": 10, "max_model_len": 40})
    run.add(*(ask(str(i), (i + 1,) * 8, max_tokens=30, ignore_eos=True) for i in range(3)))
    with caplog.at_level(logging.INFO, logger="quantlab"):
        run.run()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == run.engine.stats().preemptions > 0
    assert lines[0].startswith("preempted 2: ")


def test_with_priorities_the_least_number_goes_first() -> None:
    run = bench(policy="priority", changes={"max_num_seqs": 1})
    run.add(*(ask(name, (1, 2), priority, max_tokens=2) for name, priority in (("c", 2), ("a", -1), ("b", 2))))
    run.run()
    ends = [event.request_id for event in run.events if event.finish_reason]
    assert ends == ["a", "c", "b"]


@pytest.mark.parametrize("short_of", [{"max_num_seqs": 2}, {"num_blocks": 16, "max_model_len": 60}])
def test_who_matters_more_takes_the_place_of_who_matters_least(short_of: dict[str, int]) -> None:
    run = bench(policy="priority", changes=short_of)
    low = [ask(name, (n + 1,) * 20, priority, max_tokens=12) for n, (name, priority) in enumerate((("a", 1), ("b", 2)))]
    high = ask("high", (9,) * 20, 0, max_tokens=12, ignore_eos=True)
    run.add(*low)
    run.step()
    run.step()
    run.add(high)
    run.step()
    assert running(run) == ["a", "high"]
    run.run()
    run.assert_as_alone(*low, high)


def test_who_gives_way_does_not_come_back_in_the_same_step_even_if_there_is_room() -> None:
    run = bench(policy="priority", changes={"num_blocks": 16, "max_batch_tokens": 40})
    small, large = ask("small", (1,) * 12, 1, max_tokens=4), ask("large", (2,) * 36, 1, max_tokens=4)
    run.add(small, large)
    for _ in range(4):
        run.step()
    high = ask("high", (3,) * 32, 0, max_tokens=4)
    run.add(high)
    run.step()
    assert run.scheduler.pool.free >= 4 + 1
    assert [sequence.request.request_id for sequence in run.runner.batches[-1].admitted] == ["high"]
    assert run.engine.stats().preemptions == 2
    run.run()
    run.assert_as_alone(small, large, high)


def test_who_matters_as_much_displaces_nobody() -> None:
    run = bench(policy="priority", changes={"max_num_seqs": 1})
    run.add(ask("a", (1, 2), 1, max_tokens=9, ignore_eos=True))
    run.step()
    run.add(ask("b", (3, 4), 1, max_tokens=9))
    run.run()
    assert run.engine.stats().preemptions == 0


def test_nobody_is_sent_back_for_a_sequence_that_would_not_fit_even_so() -> None:
    run = bench(policy="priority", changes={"num_blocks": 16})
    run.add(ask("top", (1,) * 30, 0, max_tokens=9, ignore_eos=True))
    run.add(ask("low", (2,) * 8, 2, max_tokens=20, ignore_eos=True))
    run.step()
    run.add(ask("high", (3,) * 50, 1, max_tokens=9))
    run.step()
    assert running(run) == ["top", "low"]
    run.run()
    assert run.endings("high")


def test_gauges_say_what_runs_and_what_waits() -> None:
    run = bench(changes={"max_num_seqs": 2})
    run.add(*(ask(str(i), (i + 1,) * (i + 1), max_tokens=4, ignore_eos=True) for i in range(5)))
    assert run.engine.stats().waiting_tokens == 15
    run.step()
    stats = run.engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens, stats.steps) == (2, 3, 12, 1)
    assert (stats.blocks_free, stats.blocks_total) == (62, 64)


def test_requests_with_one_beginning_share_its_blocks_while_they_run() -> None:
    run = bench()
    run.add(ask("first", tuple(range(1, 18)), max_tokens=30, ignore_eos=True))
    for _ in range(3):
        run.step()
    free = run.engine.stats().blocks_free
    run.add(ask("second", (*range(1, 17), 40), max_tokens=2, ignore_eos=True))
    assert stepped(run) == {"first": 1, "second": 1}
    assert free - run.engine.stats().blocks_free <= 2


SHARED = {"num_blocks": 128, "max_model_len": 200, "max_batch_tokens": 100}


@pytest.mark.parametrize("overlap", [False, True])
def test_who_comes_with_the_same_long_prompt_waits_until_it_is_computed_once(overlap: bool) -> None:
    run = bench(overlap, changes=SHARED)
    prompt = tuple(1 + place % 40 for place in range(150))
    requests = [ask(str(i), (*prompt, i + 1), max_tokens=6, ignore_eos=True) for i in range(6)]
    run.add(*requests)
    run.run()
    run.assert_as_alone(*requests)
    # The prompt once, to the last full block; the rest of it, and five more tokens, for each; at the end of a prompt
    # little is left to wait for.
    least = 148 + 6 * (3 + 5)
    assert least <= sum(batch.tokens for batch in run.runner.batches) < least + WORTH_WAITING
    assert len(run.runner.batches) <= 2 + 1 + overlap + 6


def test_who_comes_with_another_prompt_does_not_wait() -> None:
    run = bench(changes=SHARED)
    run.add(*(ask(str(i), (i + 1,) * 90, max_tokens=3) for i in range(3)))
    assert stepped(run) == {"0": 90, "1": 10}


def test_a_short_common_beginning_is_not_waited_for() -> None:
    run = bench(changes=SHARED)
    run.add(*(ask(str(i), (7,) * 40 + (i + 1,) * 9, max_tokens=3) for i in range(2)))
    assert stepped(run) == {"0": 49, "1": 49}


@pytest.mark.parametrize("ending", ["abort", "fail"])
def test_nobody_waits_for_a_prompt_that_is_computed_no_more(ending: str) -> None:
    run = bench(changes=SHARED | {"max_batch_tokens": 80}, fails=frozenset({"first"} if ending == "fail" else ()))
    prompt = tuple(1 + place % 40 for place in range(150))
    second = ask("second", prompt, max_tokens=4)
    run.add(ask("first", prompt, max_tokens=4), second)
    run.step()
    assert running(run) == ["first"]
    if ending == "abort":
        run.engine.abort("first")
    run.run()
    run.assert_as_alone(second)
    assert run.endings("first") == ["abort" if ending == "abort" else "error"]
