"""What top-k, top-p and min-p keep, after transformers' own processors; the nucleus of a whole sort; the draw."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from quantlab.runtime.distribution import (
    BLOCK,
    draw,
    keep_likely,
    keep_top_k,
    nucleus_floor,
    padded,
    stream,
    uniform,
)
from quantlab_kernels import ref_sampling

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


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3 * BLOCK), st.floats(0, 1 - 2**-52), st.integers(0, 2**32), st.floats(0.1, 60))
def test_a_draw_inverts_the_distribution(vocab: int, at: float, seed: int, spread: float) -> None:
    torch.manual_seed(seed)
    scores = scaled(1, vocab, spread)
    scores[0, :vocab][torch.rand(vocab) < 0.5] = -torch.inf
    scores[0, torch.randint(vocab, ())] = 0.0
    weights = scores.exp()
    token = draw(weights, torch.tensor([at], dtype=torch.float64)).item()
    assert weights[0, token] > 0, "a token of probability 0 never comes"
    ends = weights.double().cumsum(-1)[0]
    low, high = (ends[token] - weights[0, token]) / ends[-1], ends[token] / ends[-1]
    assert low - 1e-6 <= at <= high + 1e-6


@pytest.mark.parametrize("at", [0.0, 1 - 2**-52])
def test_the_ends_of_the_interval_give_tokens_that_can_come(at: float) -> None:
    weights = torch.zeros(3, 2 * BLOCK)
    weights[0, 700] = 1e-30
    weights[1, [3, 900]] = torch.tensor([1.0, 1e-12])
    weights[2] = torch.rand(2 * BLOCK) + 0.1
    tokens = draw(weights, torch.full((3,), at, dtype=torch.float64)).tolist()
    assert tokens == ([700, 3, 0] if at == 0 else [700, 3, 2 * BLOCK - 1]) or tokens[1] == 900


def test_the_tail_of_a_large_vocabulary_keeps_its_probability() -> None:
    """A sum in fp32 over 128k tokens would stop growing: half the probability is in tokens of 4e-6 each."""
    weights = torch.full((1, padded(128_256)), 0.5 / 128_256)
    weights[0, 0] = 0.5
    ends = weights.double().cumsum(-1)[0]
    for at in (0.51, 0.75, 0.999):
        expected = int((ends <= at * ends[-1]).sum())
        found = draw(weights, torch.tensor([at], dtype=torch.float64)).item()
        assert abs(found - expected) <= 1


def test_uniform_numbers_are_a_function_of_seed_and_position() -> None:
    table = [[uniform(stream(seed), position) for position in range(200)] for seed in range(-50, 50)]
    numbers = torch.tensor(table, dtype=torch.float64)
    assert len(numbers.unique()) == numbers.numel() and numbers.min() >= 0 and numbers.max() < 1
    assert stream(7) == stream(7) and stream(2**64 + 7) == stream(7)
    counts = torch.histc(numbers, 100, 0, 1)
    statistic = ((counts - 200) ** 2 / 200).sum().item()
    assert 50 < statistic < 160, "chi square of 99 degrees of freedom"
    columns = numbers - numbers.mean()
    assert abs((columns[:, 1:] * columns[:, :-1]).mean() / columns.var()) < 0.03, "neighbours are independent"
    assert abs((columns[1:] * columns[:-1]).mean() / columns.var()) < 0.03
