"""The timing harness where it needs no GPU: how many copies stay cold, when the clocks are up, what an error is."""

import pytest
import torch

from quantlab.bench import gpu_timing
from quantlab.bench.gpu_timing import (
    COLD_BYTES,
    MOST_STRETCHES,
    SAME_STRETCHES,
    copies_to_stay_cold,
    relative_rmse,
    settle,
)


@pytest.mark.parametrize("nbytes", [1, 1000, 60_000_000, COLD_BYTES, 10**9])
def test_the_copies_together_outweigh_the_cache_and_no_copy_too_many(nbytes):
    copies = copies_to_stay_cold(nbytes)
    assert copies * nbytes > COLD_BYTES
    assert (copies - 1) * nbytes <= COLD_BYTES


def times_of(monkeypatch, times: list[float]) -> int:
    """Calls of `settle` if each stretch is one replay, which takes the next of `times`, and then the last for ever."""
    monkeypatch.setattr(gpu_timing, "WARM_SECONDS", 0.0)
    left = list(times)
    return settle(lambda: left.pop(0) if len(left) > 1 else left[0])


def test_replays_go_on_while_they_get_faster(monkeypatch):
    assert times_of(monkeypatch, [15, 14, 12, 10, 10, 10, 10, 10]) == 4 + SAME_STRETCHES
    assert times_of(monkeypatch, [10, 11]) == 1 + SAME_STRETCHES


def test_a_clock_that_rises_in_steps_is_waited_for(monkeypatch):
    assert times_of(monkeypatch, [10, *[10] * (SAME_STRETCHES - 1), 5]) == 2 * SAME_STRETCHES + 1
    assert times_of(monkeypatch, [10, 5, 8, 4.95, 5]) == 2 + SAME_STRETCHES


def test_replays_end_even_if_they_always_get_faster(monkeypatch):
    assert times_of(monkeypatch, [0.9**i for i in range(100)]) == MOST_STRETCHES


def test_an_error_is_relative_and_nan_never_passes():
    exact = torch.tensor([3.0, 4.0])
    assert relative_rmse(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert not relative_rmse(torch.tensor([float("nan"), 4.0]), exact) < 1e9
