"""Figures from outcomes that were made by hand, so that each can be worked out on paper."""

import json
from array import array

import numpy as np
import pytest

from quantlab.bench.serve_client import Outcome
from quantlab.bench.serve_load import Loaded
from quantlab.bench.serve_options import Level, Limits
from quantlab.bench.serve_summary import MAX_FAILURES, OTHERS, LevelResult, Spread, quantile, summarize

NONE = Limits()


def answer(due: float, ttft: float, gaps: list[float], late: float = 0.0) -> Outcome:
    """A good answer of a token at once and one after each gap."""
    last = due + ttft + sum(gaps)
    tokens = len(gaps) + 1
    return Outcome(due, due + late, due + ttft, last, array("d", gaps), tokens, 100, 40, tokens, True)


def failed(name: str) -> Outcome:
    return Outcome(0.0, 0.0, None, 1.0, failure=name)


def summed(outcomes: list[Outcome], limits: Limits = NONE) -> LevelResult:
    """The figures of a level that lasted from 0 to 10 seconds."""
    return summarize(Level(concurrency=2), Loaded(outcomes, 0.0, 10.0), limits)


def test_quantiles_are_numpys() -> None:
    values = sorted(np.random.default_rng(0).exponential(size=317).tolist())
    for share in (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)))
    assert quantile([3.0], 0.99) == 3.0


def test_latencies_and_rates() -> None:
    level = summed([answer(0.0, 0.5, [0.1, 0.3]), answer(2.0, 1.5, [0.2])])
    assert (level.sent, level.succeeded, level.failures) == (2, 2, {})
    assert (level.ttft.count, level.ttft.mean, level.ttft.p50) == (2, 1.0, 1.0)
    assert (level.itl.count, level.itl.p50, level.itl.maximum) == (3, 0.2, 0.3)
    assert (level.tpot.p50, level.e2e.maximum) == (pytest.approx(0.2), pytest.approx(1.7))
    assert (level.request_rate, level.output_rate, level.total_rate) == (0.2, 0.5, 20.5)
    assert (level.prompt_tokens, level.cached_tokens, level.output_tokens) == (200, 80, 5)


def test_failures_count_by_name_and_in_nothing_else() -> None:
    level = summed([answer(0.0, 0.5, []), failed("timed out"), failed("HTTP 429"), failed("HTTP 429")])
    assert level.failures == {"HTTP 429": 2, "timed out": 1}
    assert (level.sent, level.succeeded, level.ttft.count, level.request_rate) == (4, 1, 1, 0.1)


def test_many_kinds_of_failure_stay_a_short_list() -> None:
    level = summed([failed(f"reason {index}") for index in range(40)])
    assert len(level.failures) == MAX_FAILURES + 1
    assert level.failures[OTHERS] == 40 - MAX_FAILURES


def test_goodput_counts_answers_that_kept_every_limit() -> None:
    outcomes = [answer(0, 0.5, [0.1]), answer(0, 2.0, [0.1]), answer(0, 0.5, [0.9]), answer(0, 0.5, []), failed("x")]
    assert summed(outcomes).good is None and summed(outcomes).goodput is None
    assert summed(outcomes, Limits(ttft=1.0)).good == 3
    level = summed(outcomes, Limits(ttft=1.0, tpot=0.2))
    assert (level.good, level.goodput) == (2, 0.2)  # one token has no time for each further token
    assert summed(outcomes, Limits(e2e=0.55)).good == 1


def test_a_late_client_is_told_of() -> None:
    assert summed([answer(0, 0.5, [], late=0.2)] * 3).late == pytest.approx(0.2)


def test_the_timeline_holds_all_text_and_all_time() -> None:
    outcomes = [answer(0.0, 0.5, [0.1, 0.3]), answer(2.0, 1.5, [0.2] * 30), answer(9.0, 0.9, [])]
    level = summed(outcomes)
    width = level.seconds / len(level.timeline)
    assert sum(moment.pieces * width for moment in level.timeline) == pytest.approx(35)
    whole = sum(outcome.e2e for outcome in outcomes)
    assert sum(moment.under_way * width for moment in level.timeline) == pytest.approx(whole)
    assert max(moment.under_way for moment in level.timeline) == pytest.approx(2)


def test_nothing_succeeded_is_a_result_too() -> None:
    level = summed([failed("timed out")])
    assert (level.ttft, level.output_rate, level.requests) == (Spread.of([]), 0.0, ())
    json.dumps(level.as_json(), allow_nan=False)
