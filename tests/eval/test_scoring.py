"""What is said of every token: against cases worked out by hand, and against whole-vocabulary sums in fp64."""

import math

import pytest
import torch
from torch import Tensor

from quantlab.errors import NumericsError
from quantlab.eval.scoring import TokenScores, chunks, score_chunk, token_nll


def brute_force(baseline: Tensor, candidate: Tensor, targets: Tensor) -> TokenScores:
    """Straight from the definitions, in fp64 throughout."""
    p, q = baseline.double().log_softmax(-1), candidate.double().log_softmax(-1)
    right = targets[:, None]
    before, after = p.gather(-1, right)[:, 0], q.gather(-1, right)[:, 0]
    kl = (p.exp() * (p - q)).sum(-1)
    return TokenScores(-before, -after, kl, p.argmax(-1) == q.argmax(-1), after.exp() - before.exp())


def logits_of(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_a_case_worked_out_by_hand() -> None:
    """Two tokens over three words; KL and the change of p are sums that fit on a line."""
    baseline = logits_of([0.5, 0.25, 0.25], [0.7, 0.2, 0.1])
    candidate = logits_of([0.25, 0.5, 0.25], [0.6, 0.2, 0.2])
    scores = score_chunk(baseline, candidate, torch.tensor([1, 0]))
    ln2 = math.log(2)
    assert scores.baseline_nll.tolist() == pytest.approx([2 * ln2, -math.log(0.7)], abs=1e-6)
    assert scores.nll.tolist() == pytest.approx([ln2, -math.log(0.6)], abs=1e-6)
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5) + 0 = 0.25 ln 2
    second = 0.7 * math.log(0.7 / 0.6) + 0.1 * math.log(0.1 / 0.2)
    assert scores.kl.tolist() == pytest.approx([0.25 * ln2, second], abs=1e-6)
    assert scores.agree.tolist() == [False, True]
    assert scores.delta_p.tolist() == pytest.approx([0.25, -0.1], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_every_column_is_that_of_whole_sums_in_fp64(scale: float, offset: float) -> None:
    baseline = scale * torch.randn(64, 5000) + offset
    candidate = baseline + 0.1 * torch.randn(64, 5000)
    targets = torch.randint(0, 5000, (64,))
    found, wanted = score_chunk(baseline, candidate, targets), brute_force(baseline, candidate, targets)
    # fp32 logits near 1000 are themselves 3e-5 apart from each other, so nothing sharper can be asked of single ones.
    tolerance = 1e-6 if offset == 0.0 else 3e-6
    for ours, exact in zip(found.columns, wanted.columns, strict=True):
        assert (ours.double() - exact.double()).abs().max().item() <= tolerance


def test_logits_are_left_as_they_were() -> None:
    baseline, candidate = torch.randn(4, 50), torch.randn(4, 50)
    kept = baseline.clone(), candidate.clone()
    score_chunk(baseline, candidate, torch.arange(4))
    assert torch.equal(baseline, kept[0]) and torch.equal(candidate, kept[1])


def test_a_distribution_against_itself_is_exactly_nothing() -> None:
    logits = (5 * torch.randn(32, 1000)).bfloat16()
    scores = score_chunk(logits, logits, torch.randint(0, 1000, (32,)))
    assert scores.kl.abs().max() == 0.0 and scores.delta_p.abs().max() == 0.0
    assert torch.equal(scores.nll, scores.baseline_nll) and scores.agree.all()


def test_divergence_is_not_symmetric_and_never_negative() -> None:
    one, other = torch.randn(200, 33), torch.randn(200, 33)
    targets = torch.zeros(200, dtype=torch.int64)
    there, back = score_chunk(one, other, targets).kl, score_chunk(other, one, targets).kl
    assert not torch.allclose(there, back, rtol=0.01)
    close = score_chunk(one, one + 1e-6 * torch.randn(200, 33), targets).kl
    assert close.min() >= 0.0 and close.max() < 1e-6


def test_divergence_survives_logits_far_apart() -> None:
    one, other = torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])
    assert score_chunk(one, other, torch.tensor([0])).kl.item() == pytest.approx(500.0)


def test_uniform_logits_score_the_vocabulary_size() -> None:
    nll = token_nll(torch.zeros(5, 37, dtype=torch.bfloat16), torch.arange(5))
    assert nll.exp().tolist() == pytest.approx([37.0] * 5, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("place", "who"), [(0, "baseline"), (1, "candidate")])
def test_broken_logits_name_the_model(value: float, place: int, who: str) -> None:
    both = [torch.randn(3, 20), torch.randn(3, 20)]
    both[place][1, 7] = value
    with pytest.raises(NumericsError, match=f"the {who}'s logits are NaN or infinite"):
        score_chunk(*both, torch.zeros(3, dtype=torch.int64))


def test_one_infinite_logit_does_not_slip_through() -> None:
    candidate = torch.randn(3, 20)
    candidate[1, 7] = -math.inf
    with pytest.raises(NumericsError):
        score_chunk(torch.randn(3, 20), candidate, torch.zeros(3, dtype=torch.int64))


def test_chunks_cover_everything_once() -> None:
    assert [(part.start, part.stop) for part in chunks(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert list(chunks(0, 4)) == []
