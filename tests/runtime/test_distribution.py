"""What top-k, top-p and min-p keep, after transformers' own processors; the nucleus of a whole sort; the draw."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from quantlab.runtime.distribution import (
    BLOCK,
    keep_likely,
    keep_top_k,
    keys,
    nucleus_floor,
    padded,
    race,
    stream,
)
from quantlab_kernels import ref_sampling, sampling

Nucleus = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NUCLEI = pytest.mark.parametrize("nucleus", [nucleus_floor, ref_sampling.nucleus_floor])


def scaled(rows: int, vocab: int, spread: float) -> torch.Tensor:
    """Scores as the sampler hands them over: padded, the greatest of each row 0."""
    scores = torch.full((rows, padded(vocab)), -torch.inf)
    values = torch.randn(rows, vocab) * spread
    scores[:, :vocab] = values - values.amax(-1, keepdim=True)
    return scores


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [5, 700, 4096])
def test_tokens_kept_are_those_that_transformers_keeps(vocab: int, spread: float) -> None:
    settings = [
        (0, 0.9, 0.0),
        (1, 1.0, 0.0),
        (50, 1.0, 0.0),
        (0, 0.5, 0.1),
        (0, 1.0, 0.3),
        (3, 0.7, 0.02),
        (9999, 0.99, 0),
    ]
    scores = scaled(len(settings), vocab, spread)
    expected = scores[:, :vocab].clone()
    for row, (top_k, top_p, min_p) in enumerate(settings):
        one, ids = expected[row : row + 1], torch.zeros(1, 1, dtype=torch.long)
        one = TopKLogitsWarper(top_k)(ids, one) if top_k else one
        one = TopPLogitsWarper(top_p)(ids, one) if top_p < 1 else one
        expected[row] = MinPLogitsWarper(min_p)(ids, one)[0] if min_p else one[0]
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*settings, strict=True))
    keep_top_k(scores, top_k, 9999)
    keep_likely(scores, top_p, min_p, nucleus_floor)
    assert torch.equal(scores[:, :vocab], expected)
    assert (scores[:, vocab:] == -torch.inf).all()


@NUCLEI
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(nucleus: Nucleus) -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0]]).expand(5, 5)
    floors = nucleus(probabilities, torch.tensor([0.39, 0.41, 0.71, 0.95, 2.0]))
    kept = [(row >= floor).tolist().count(True) for row, floor in zip(probabilities, floors, strict=True)]
    assert kept == [1, 2, 3, 4, 5]


@NUCLEI
def test_tokens_that_tie_with_the_last_one_stay(nucleus: Nucleus) -> None:
    """Scores in bf16 tie often; which of the equal tokens a sort puts first must not matter."""
    probabilities = torch.tensor([[0.25, 0.125, 0.125, 0.125, 0.125, 0.25]])
    assert nucleus(probabilities, torch.tensor([0.6])).item() == 0.125
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    keep_top_k(scores, torch.tensor([2]), 2)
    assert scores.tolist() == [[0.0, -1.0, -1.0, -1.0, -torch.inf]]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 40.0])
def test_the_nucleus_is_that_of_a_whole_sort(spread: float) -> None:
    probabilities = scaled(24, 20_000, spread).double().softmax(-1).float()
    top_p = torch.rand(24) * 0.98 + 0.01
    found, other = ref_sampling.nucleus_floor(probabilities, top_p), nucleus_floor(probabilities, top_p)
    for row, one, two, limit in zip(probabilities.double(), found, other, top_p, strict=True):
        # Where rounding decides, the two may be one token apart: the mass between them is next to nothing.
        low, high = sorted((one.item(), two.item()))
        between = row[(row >= low) & (row < high)].unique()
        assert len(between) <= 1 or row[row > low].sum().item() == pytest.approx(limit.item(), abs=1e-5)


def test_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    probabilities = torch.arange(20_000, 0, -1, dtype=torch.float64)[None]
    probabilities = (probabilities / probabilities.sum()).float()
    floor = nucleus_floor(probabilities, torch.tensor([0.9]))
    kept = probabilities[0] >= floor
    exact = probabilities[0].double()
    assert exact[kept].sum() >= 0.9 - 1e-6 > exact[kept].sum() - exact[kept].min() - 2e-6
    assert 256 < kept.sum() < 20_000


def keys_of(seeds: range, positions: range) -> torch.Tensor:
    return torch.tensor([keys(stream(seed), at) for seed in seeds for at in positions], dtype=torch.int32)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3 * BLOCK), st.integers(0, 2**32), st.floats(0.1, 60), st.integers(1, 9))
def test_a_token_that_cannot_come_never_comes(vocab: int, seed: int, spread: float, rows: int) -> None:
    torch.manual_seed(seed)
    scores = scaled(rows, vocab, spread)
    scores[:, :vocab][torch.rand(rows, vocab) < 0.9] = -torch.inf
    scores[torch.arange(rows), torch.randint(vocab, (rows,))] = 0.0
    drawn = race(scores, keys_of(range(seed, seed + rows), range(1)))
    assert (scores[torch.arange(rows), drawn] > -torch.inf).all()


def test_rows_are_drawn_alike_together_and_alone() -> None:
    scores, noise = scaled(40, 9000, 2.0), keys_of(range(40), range(1))
    together = race(scores, noise)
    assert len(scores) * scores.shape[1] > 1 << 18, "more than are worked on at once"
    assert torch.equal(together, torch.cat([race(scores[i : i + 1], noise[i : i + 1]) for i in range(40)]))
    assert race(scores[:0], noise[:0]).shape == (0,)


def test_tokens_are_drawn_as_often_as_they_should_be() -> None:
    """With the seeds and positions of many short texts, and of one long one."""
    vocab, draws = 400, 40_000
    scores = scaled(1, vocab, 2.0)
    expected = scores[0].softmax(-1) * draws
    for seeds, positions in ((range(draws // 10), range(10)), (range(1), range(draws))):
        counts = torch.bincount(race(scores.expand(draws, -1), keys_of(seeds, positions)), minlength=scores.shape[1])
        cells = expected >= 5
        statistic = ((counts - expected) ** 2 / expected)[cells].sum().item()
        freedom = int(cells.sum()) - 1
        assert abs(statistic - freedom) / (2 * freedom) ** 0.5 < 5


def test_the_tail_of_a_large_vocabulary_keeps_its_probability() -> None:
    """Half of it is in tokens of 4e-6 each, and a hundredth in tokens of 8e-8."""
    scores = torch.zeros(1, padded(128_256))
    scores[0, 0] = math.log(scores.shape[1])
    scores[0, 64_000:] -= math.log(50)
    drawn = race(scores.expand(1200, -1), keys_of(range(1200), range(7, 8)))
    expected = torch.stack([scores[0].softmax(-1)[part].sum() for part in (slice(0, 1), slice(1, 64_000))])
    found = torch.tensor([(drawn == 0).float().mean(), ((drawn > 0) & (drawn < 64_000)).float().mean()])
    assert (found - expected).abs().max() < 0.06
    assert len(drawn[drawn > 0].unique()) > 0.97 * (drawn > 0).sum()


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_scores_that_differ_a_little_draw_the_same_token(noise: float) -> None:
    """By no more than twice the distance of the two distributions, which is the best that can be hoped for."""
    draws = 4000
    scores = scaled(1, 5000, 2.0)
    other = scores + torch.randn(scores.shape) * noise
    distance = (scores.softmax(-1) - other.softmax(-1)).abs().sum().item() / 2
    noises = keys_of(range(draws), range(1))
    moved = (race(scores.expand(draws, -1), noises) != race(other.expand(draws, -1), noises)).sum().item()
    expected = 2 * distance * draws
    assert moved <= expected + 5 * (expected + 1) ** 0.5


def test_keys_are_a_function_of_seed_and_position() -> None:
    assert stream(7) == stream(7) and stream(2**64 + 7) == stream(7)
    table = torch.tensor([[keys(stream(seed), at)[0] for at in range(200)] for seed in range(-50, 50)])
    assert len(table.unique()) > 0.999 * table.numel() and table.min() >= -(2**31) and table.max() < 2**31
    numbers = table.double() / 2**32 + 0.5
    counts = torch.histc(numbers, 100, 0, 1)
    statistic = ((counts - 200) ** 2 / 200).sum().item()
    assert 50 < statistic < 160, "chi square of 99 degrees of freedom"
    columns = numbers - numbers.mean()
    assert abs((columns[:, 1:] * columns[:, :-1]).mean() / columns.var()) < 0.03, "neighbours are independent"
    assert abs((columns[1:] * columns[:-1]).mean() / columns.var()) < 0.03


def test_the_noise_of_neighbouring_tokens_and_rows_is_independent() -> None:
    """Flat scores: the winner is the token with the earliest clock, anywhere with the same probability."""
    drawn = race(torch.zeros(8000, 2 * BLOCK), keys_of(range(40), range(200))).view(40, 200)
    cells = torch.histc(drawn.float(), 64, 0, 2 * BLOCK)
    assert 20 < ((cells - 125) ** 2 / 125).sum().item() < 130, "chi square of 63 degrees of freedom"
    centred = drawn.double() - drawn.double().mean()
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).mean() / centred.var()) < 0.05


def test_a_gpu_s_race_has_the_same_winners() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.randn(20, 3072)
    both = torch.randint(-(2**31), 2**31, (20, 2), dtype=torch.int32)
    winners = sampling.race(scores.to(device), both.to(device)).cpu()
    assert (race(scores, both) == winners).float().mean() > 0.9
