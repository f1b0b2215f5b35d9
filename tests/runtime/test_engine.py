"""The engine: every request gets what it gets alone, however steps, blocks and arrivals fall."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantlab.errors import UsageError
from quantlab.runtime.batch import Batch
from quantlab.runtime.request import Grammar, Request
from tests.runtime.scripted import EOS, ask, bench, expected, prompts

SMALL = {"num_blocks": 16, "max_model_len": 40, "max_batch_tokens": 12}


def many(count: int, length: int = 5, max_tokens: int = 20) -> list[Request]:
    return [ask(str(i), prompt, max_tokens=max_tokens) for i, prompt in enumerate(prompts(count, length))]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [8, 9, 1000])
def test_requests_together_get_what_they_get_alone(overlap: bool, caching: bool, budget: int) -> None:
    run = bench(overlap, prefix_caching=caching, changes={"max_batch_tokens": budget})
    requests = many(30, 17)
    run.add(*requests)
    run.run()
    run.assert_as_alone(*requests)
    assert run.runner.read == [batch.step for batch in run.runner.batches]
    assert run.engine.stats().blocks_free == 64


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_come_while_others_run_get_the_same(overlap: bool) -> None:
    run = bench(overlap)
    requests = many(20)
    for request in requests:
        run.add(request)
        run.step()
    run.run()
    run.assert_as_alone(*requests)


@pytest.mark.parametrize("overlap", [False, True])
def test_running_out_of_blocks_changes_no_token(overlap: bool) -> None:
    run = bench(overlap, changes=SMALL)
    requests = [ask(str(i), prompt, max_tokens=30, ignore_eos=True) for i, prompt in enumerate(prompts(8))]
    run.add(*requests)
    run.run()
    run.assert_as_alone(*requests)
    stats = run.engine.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens > 0
    assert stats.generation_tokens == 8 * 30


def test_with_overlap_a_step_is_launched_before_the_one_before_is_read() -> None:
    run = bench()
    run.add(ask("a", (1, 2, 3), max_tokens=5, ignore_eos=True))
    assert run.step() == []
    assert len(run.runner.batches) == 1
    assert len(run.step()) == 1
    assert (len(run.runner.batches), run.runner.read) == (2, [1])


def test_the_last_token_of_a_known_length_is_not_followed_by_a_step_for_nothing() -> None:
    run = bench()
    run.add(ask("a", (1, 2, 3), max_tokens=5, ignore_eos=True))
    run.run()
    assert sum(batch.tokens for batch in run.runner.batches) == 3 + 4


def test_what_a_sequence_computed_past_its_end_is_dropped() -> None:
    prompt = next(p for p in prompts(200) if expected(ask("a", p, max_tokens=30))[1] == "stop")
    request = ask("a", prompt, max_tokens=30)
    run = bench()
    run.add(request)
    run.run()
    run.assert_as_alone(request)
    assert run.events[-1].stop_token == EOS == run.events[-1].token_ids[-1]
    assert len(run.runner.batches) == len(expected(request)[0]) + 1
    assert run.engine.stats().generation_tokens == len(expected(request)[0])


def test_stop_tokens_end_a_text_and_ignore_eos_does_not_hide_them() -> None:
    prompt = (1, 2, 3, 4)
    free = expected(ask("a", prompt, max_tokens=30, ignore_eos=True))[0]
    request = ask("a", prompt, max_tokens=30, ignore_eos=True, stop_token_ids=(free[9],))
    run = bench()
    run.add(request)
    run.run()
    run.assert_as_alone(request)
    assert run.tokens("a") == free[: free.index(free[9]) + 1]
    assert run.events[-1].stop_token == free[9]


def test_nothing_ends_a_text_before_its_least_number_of_tokens() -> None:
    prompt = next(p for p in prompts(400) if len(expected(ask("a", p, max_tokens=30))[0]) < 5)
    request = ask("a", prompt, max_tokens=30, min_tokens=10)
    run = bench()
    run.add(request)
    run.run()
    run.assert_as_alone(request)
    assert len(run.tokens("a")) > 10


def test_without_a_limit_a_text_ends_at_the_models_length() -> None:
    request = ask("a", (1, 2, 3), max_tokens=None, ignore_eos=True)
    run = bench()
    run.add(request)
    run.run()
    run.assert_as_alone(request)
    assert 3 + len(run.tokens("a")) == 64


def test_a_request_for_no_token_computes_its_prompt_and_says_so() -> None:
    run = bench(changes={"max_batch_tokens": 4})
    run.add(ask("a", tuple(range(1, 11)), max_tokens=0, prompt_logprobs=1))
    run.run()
    (event,) = run.events
    assert (event.token_ids, event.finish_reason) == ((), "length")
    assert event.prompt_logprobs is not None
    assert [p and -p.logprob for p in event.prompt_logprobs] == [None, *range(2, 11)]
    assert sum(batch.tokens for batch in run.runner.batches) == 10


def test_a_prompt_that_was_seen_is_not_computed_again_but_for_its_last_token() -> None:
    run = bench()
    first, second = (ask(name, tuple(range(1, 18)), max_tokens=4, ignore_eos=True) for name in "ab")
    run.add(first)
    run.run()
    before = sum(batch.tokens for batch in run.runner.batches)
    run.add(second)
    run.run()
    run.assert_as_alone(first, second)
    assert sum(batch.tokens for batch in run.runner.batches) - before == 1 + 3
    assert [event.cached_tokens for event in run.events if event.request_id == "b"] == [16] * 4
    stats = run.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (34, 16, 34)


def test_a_prompt_of_full_blocks_leaves_a_token_to_compute() -> None:
    run = bench()
    for name in "ab":
        run.add(ask(name, tuple(range(1, 9)), max_tokens=3))
        run.run()
    run.assert_as_alone(*(ask(name, tuple(range(1, 9)), max_tokens=3) for name in "ab"))
    assert run.events[-1].cached_tokens == 4


def test_an_answer_is_known_to_the_next_turn() -> None:
    run = bench()
    first = ask("a", (1, 2, 3, 4, 5), max_tokens=12, ignore_eos=True)
    run.add(first)
    run.run()
    second = ask("b", (*first.prompt_ids, *run.tokens("a"), 7), max_tokens=3)
    run.add(second)
    run.run()
    run.assert_as_alone(second)
    assert run.events[-1].cached_tokens == 16


def test_other_salts_share_nothing() -> None:
    run = bench()
    requests = [ask(name, tuple(range(1, 18)), salt=salt, max_tokens=4) for name, salt in ("ax", "bx", "cy")]
    for request in requests:
        run.add(request)
        run.run()
    run.assert_as_alone(*requests)
    assert [next(e.cached_tokens for e in run.events if e.request_id == name) for name in "abc"] == [0, 16, 0]


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    run = bench(prefix_caching=False)
    for name in "ab":
        run.add(ask(name, tuple(range(1, 18)), max_tokens=4))
        run.run()
    stats = run.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (0, 0)


def test_log_probabilities_of_a_prompt_want_every_position_computed() -> None:
    run = bench(changes=SMALL)
    prompt = tuple(range(1, 14))
    for name in "ab":
        run.add(ask(name, prompt, max_tokens=2, prompt_logprobs=0, logprobs=0))
        run.run()
    told = [event for event in run.events if event.request_id == "b"]
    assert told[0].prompt_logprobs is not None
    assert [p and -p.logprob for p in told[0].prompt_logprobs] == [None, *prompt[1:]]
    assert [event.prompt_logprobs for event in told[1:]] == [None] * (len(told) - 1)
    assert [-lp.logprob for event in told for lp in event.logprobs or ()] == run.tokens("b")
    assert told[0].cached_tokens == 0


def test_log_probabilities_of_a_prompt_survive_a_preemption() -> None:
    run = bench(policy="priority", changes=SMALL | {"max_batch_tokens": 4})
    prompt = tuple(range(1, 30))
    run.add(ask("low", prompt, priority=1, max_tokens=2, prompt_logprobs=0))
    for _ in range(4):
        run.step()
    run.add(ask("high", tuple(range(16, 49)), max_tokens=8))
    run.run()
    assert run.engine.stats().preemptions == 1
    told = next(event.prompt_logprobs for event in run.events if event.request_id == "low")
    assert told is not None
    assert [p and -p.logprob for p in told] == [None, *prompt[1:]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_frees_its_blocks_at_once_and_says_so(overlap: bool, steps: int) -> None:
    run = bench(overlap)
    others = many(3)
    run.add(ask("gone", (9,) * 20, max_tokens=40, ignore_eos=True), *others)
    for _ in range(steps):
        run.step()
    free = run.engine.stats().blocks_free
    assert run.engine.abort("gone")
    run.scheduler.check_integrity()
    assert run.engine.stats().blocks_free > free or steps == 0
    assert run.step()[0].finish_reason == "abort"
    run.run()
    run.assert_as_alone(*others)
    assert run.endings("gone") == ["abort"]
    assert run.engine.stats().blocks_free == 64


def test_nobody_is_aborted_twice_and_strangers_not_at_all() -> None:
    run = bench()
    run.add(ask("a", (1, 2)))
    assert run.engine.abort("a")
    assert not run.engine.abort("a")
    assert not run.engine.abort("b")


def test_an_id_may_be_used_again_while_its_old_step_is_under_way() -> None:
    run = bench()
    run.add(ask("a", (1, 2, 3), max_tokens=9, ignore_eos=True))
    run.step()
    run.engine.abort("a")
    again = ask("a", (4, 5, 6), max_tokens=3, ignore_eos=True)
    run.add(again)
    run.run()
    assert run.tokens("a") == expected(again)[0]
    assert run.endings("a") == ["abort", "length"]


@pytest.mark.parametrize("overlap", [False, True])
def test_wrong_numbers_end_their_request_alone_and_are_not_reused(overlap: bool) -> None:
    run = bench(overlap, fails=frozenset({"bad"}), changes={"max_batch_tokens": 8})  # in pieces, the first of them fine
    others = many(4)
    run.add(ask("bad", tuple(range(1, 18))), *others)
    run.run()
    run.assert_as_alone(*others)
    (event,) = [event for event in run.events if event.request_id == "bad"]
    assert (event.finish_reason, event.error, event.token_ids) == ("error", "wrong numbers", ())
    run.add(ask("good", tuple(range(1, 18)), max_tokens=2))
    run.run()
    assert run.events[-1].cached_tokens == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("changes", [{}, SMALL])
def test_a_step_that_cannot_be_launched_is_as_if_it_had_not_been(overlap: bool, changes: dict[str, int]) -> None:
    run = bench(overlap, changes=changes)
    requests = many(12, 9)
    for number, request in enumerate(requests):
        run.add(request)
        if number % 3 == 0:
            run.runner.breaks = [True]
            with pytest.raises(MemoryError):
                run.step()
            run.scheduler.check_integrity()
        run.step()
    run.run()
    run.assert_as_alone(*requests)
    stats = run.engine.stats()
    assert (stats.blocks_free, stats.running) == (stats.blocks_total, 0)


def test_a_grammar_sees_each_token_before_the_next_is_drawn() -> None:
    run = bench()
    bound = ask("bound", (1, 2, 3), max_tokens=8, grammar=Grammar("json_object"))
    free = ask("free", (4, 5, 6), max_tokens=16, ignore_eos=True)
    run.add(bound, free)
    while run.engine.has_work:
        run.step()
        for part in run.runner.batches[-1].slices:
            assert part.sequence.request is not bound or part.sequence.pending <= 1
    run.assert_as_alone(bound, free)
    steps = [b.step for b in run.runner.batches if any(p.sequence.request is bound for p in b.slices)]
    assert min(later - earlier for earlier, later in zip(steps, steps[1:], strict=False)) == 2


def test_the_end_of_a_grammars_text_is_its_end_whatever_else_was_asked() -> None:
    prompt = next(p for p in prompts(400) if len(expected(ask("a", p, max_tokens=30))[0]) < 5)
    settings = {"max_tokens": 30, "min_tokens": 10, "ignore_eos": True}
    run = bench()
    run.add(ask("a", prompt, grammar=Grammar("json_object"), **settings))
    run.run()
    assert run.tokens("a") == expected(ask("a", prompt, max_tokens=30))[0]
    assert run.endings("a") == ["stop"]


def test_a_request_that_can_never_run_is_refused_and_leaves_nothing() -> None:
    run = bench()
    with pytest.raises(UsageError, match="64 tokens, the longest that can be continued here has 63"):
        run.add(ask("a", (1,) * 64))
    assert not run.engine.has_work


def test_an_id_in_use_is_refused() -> None:
    run = bench()
    run.add(ask("a", (1, 2)))
    with pytest.raises(UsageError, match="id"):
        run.add(ask("a", (3, 4)))


# Few beginnings, so that they are shared, and all lengths around a block's ends.
PROMPTS = st.tuples(st.integers(1, 2), st.integers(1, 24)).map(lambda drawn: (drawn[0],) * drawn[1])


class Traffic(RuleBasedStateMachine):
    """Requests of few different tokens come, are aborted and fail while steps go on, in a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.asked: list[Request] = []
        self.ended: set[str] = set()
        self.start(True, "fcfs")

    def start(self, overlap: bool, policy: str) -> None:
        self.run = bench(overlap, policy, fails=frozenset({"5", "9"}), changes=SMALL)  # type: ignore[arg-type]

    @rule(
        work=st.lists(st.tuples(PROMPTS, st.integers(0, 16), st.integers(0, 2)), min_size=1, max_size=6),
        salt=st.sampled_from(["", "", "", "s"]),
    )
    def ask(self, work: list[tuple[tuple[int, ...], int, int]], salt: str) -> None:
        for prompt, tokens, priority in work:
            request = ask(str(self.count), prompt, priority, salt, max_tokens=tokens, ignore_eos=tokens % 2 == 0)
            self.count += 1
            self.run.add(request)
            self.asked.append(request)

    @precondition(lambda self: len(self.asked) > 3 * len(self.ended))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.asked))
        if self.run.engine.abort(request.request_id):
            self.ended.add(request.request_id)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            before, launched = self.run.engine.stats().preemptions, len(self.run.runner.batches)
            self.run.step()
            if self.run.engine.stats().preemptions > before and len(self.run.runner.batches) > launched:
                self.check_admitted(self.run.runner.batches[-1])

    def check_admitted(self, batch: Batch) -> None:
        """Nobody comes in while others have to leave."""
        assert not batch.admitted

    @invariant()
    def adds_up(self) -> None:
        self.run.scheduler.check_integrity()

    def teardown(self) -> None:
        self.run.run()
        for request in self.asked:
            name = request.request_id
            if name in self.ended:
                tokens = expected(request, 40)[0]
                assert self.run.tokens(name) == tokens[: len(self.run.tokens(name))]
                assert self.run.endings(name) == ["abort"]
            elif name in self.run.runner.fails and request.params.max_tokens:
                assert self.run.endings(name) == ["error"]
            else:
                self.run.assert_as_alone(request)
        stats = self.run.engine.stats()
        assert (stats.blocks_free, stats.running, stats.waiting, stats.waiting_tokens) == (16, 0, 0, 0)


class PriorityTraffic(Traffic):
    """The same, some requests mattering more than others."""

    def start(self, overlap: bool, policy: str) -> None:
        super().start(overlap, "priority")

    def check_admitted(self, batch: Batch) -> None:
        """Who comes in matters more than who had to leave, and never is one of them."""
        left = {sequence.order for sequence in self.run.scheduler.waiting if sequence.preemptions}
        assert not left & {sequence.order for sequence in batch.admitted}


class PlainTraffic(PriorityTraffic):
    """The same, each step read back before the next is scheduled."""

    def start(self, overlap: bool, policy: str) -> None:
        super().start(False, policy)


TestTraffic, TestPriorityTraffic, TestPlainTraffic = Traffic.TestCase, PriorityTraffic.TestCase, PlainTraffic.TestCase
TestTraffic.settings = TestPriorityTraffic.settings = TestPlainTraffic.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 6)), max_size=20), st.integers(1, 20))
def test_the_order_of_arrival_and_the_budget_change_no_token(
    work: list[tuple[tuple[int, ...], int, int]], budget: int
) -> None:
    run = bench(changes=SMALL | {"max_batch_tokens": budget})
    requests = [ask(str(i), prompt, max_tokens=tokens) for i, (prompt, tokens, _) in enumerate(work)]
    for request, (_, _, pause) in zip(requests, work, strict=True):
        run.add(request)
        for _ in range(pause):
            run.step()
    run.run()
    run.assert_as_alone(*requests)
