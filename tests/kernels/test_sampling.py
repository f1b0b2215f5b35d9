"""The sampling kernels against sorts, sums and races in torch."""

import pytest
import torch
from torch import Tensor

from quantlab_kernels import ref_sampling, sampling
from quantlab_kernels.warm_up import compilations

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def probabilities(rows: int, columns: int, spread: float) -> Tensor:
    return (torch.randn(rows, columns, device=DEVICE) * spread).softmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1000), (5, 9001), (1, 20000)])
def test_the_greatest_score_and_its_first_column(rows: int, columns: int, dtype: torch.dtype):
    scores = torch.randn(rows, columns, device=DEVICE).to(dtype)
    scores[0, columns // 2 :] = scores[0].amax() + 1  # many equals: the first counts
    value, token = sampling.greatest(scores)
    wanted, place = ref_sampling.greatest(scores)
    assert torch.equal(value, wanted) and torch.equal(token, place)
    assert token[0] == columns // 2


def test_rows_of_infinities_and_nan():
    scores = torch.full((3, 5000), -torch.inf, device=DEVICE)
    scores[1, 4321], scores[2, 77] = torch.inf, torch.nan
    value, token = sampling.greatest(scores)
    assert value[0] == -torch.inf and value[1] == torch.inf and bool(value[2].isnan())
    assert token.tolist() == [0, 4321, 0]


def test_rows_settle_on_a_token_or_on_why_there_is_none():
    best = torch.tensor([0.5, -torch.inf, torch.inf, torch.nan, -3.0], device=DEVICE)
    tokens, slots = torch.tensor([7, 8, 9, 4, 5], device=DEVICE), torch.tensor([6, 0, 1, 3, 2], device=DEVICE)
    last, wanted = torch.full((8,), 99, device=DEVICE), torch.full((8,), 99, device=DEVICE)
    codes = sampling.settle(best, tokens, slots, last)
    assert codes.tolist() == [7, sampling.NOTHING_LEFT.value, sampling.NOT_FINITE.value, sampling.NOT_FINITE.value, 5]
    assert torch.equal(codes, ref_sampling.settle(best, tokens, slots, wanted)) and torch.equal(last, wanted)
    assert last.tolist() == [0, 0, 5, 0, 99, 99, 7, 99]


def test_rows_may_be_those_of_a_wider_matrix():
    wide = torch.randn(4, 3000, device=DEVICE)
    assert torch.equal(sampling.greatest(wide[:, :1111])[1], wide[:, :1111].argmax(-1))


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("rows", "columns"), [(3, 512), (3, 2560), pytest.param(69, 128512, marks=pytest.mark.gpu)])
def test_the_nucleus_is_that_of_a_sort(rows: int, columns: int, spread: float):
    p, top_p = probabilities(rows, columns, spread), torch.tensor([0.1, 0.5, 0.99], device=DEVICE).repeat(rows // 3)
    floor = sampling.nucleus_floor(p, top_p)
    # The sums are in fp32: at the border, a token more or less.
    kept, likelier = (torch.where(keep, p, 0.0).double().sum(-1) for keep in (p >= floor[:, None], p > floor[:, None]))
    assert bool((likelier < top_p + 1e-5).all()) and bool((kept > top_p - 1e-5).all())
    assert torch.allclose(floor, ref_sampling.nucleus_floor(p, top_p), rtol=1e-2)
    assert torch.equal(floor, sampling.nucleus_floor(p, top_p))


def test_a_row_may_ask_for_all_tokens_or_the_likeliest():
    p = probabilities(3, 2048, 2.0)
    floor = sampling.nucleus_floor(p, torch.tensor([2.0, 1e-38, 0.7], device=DEVICE))
    assert floor[0] == 0 and floor[1] == p[1].amax()
    assert torch.allclose(floor[2:], ref_sampling.nucleus_floor(p[2:], torch.tensor([0.7], device=DEVICE)), rtol=1e-2)


def some_keys(rows: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(1, 512), (40, 5120), pytest.param(70, 128512, marks=pytest.mark.gpu)])
def test_the_race_is_won_by_the_same_token_as_in_double_precision(rows: int, columns: int):
    scores, keys = torch.randn(rows, columns, device=DEVICE) * 3, some_keys(rows)
    scores[:, ::3] = -torch.inf
    token = sampling.race(scores, keys)
    assert (token == ref_sampling.race(scores, keys)).float().mean() > 0.98, "two clocks may ring nearly together"
    assert bool(scores.gather(1, token[:, None]).isfinite().all())
    assert torch.equal(token, sampling.race(scores, keys))


def test_winners_follow_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2], device=DEVICE)
    scores = torch.full((4000, 512), -torch.inf, device=DEVICE)
    scores[:, :4] = p.log()
    counts = torch.bincount(sampling.race(scores, some_keys(4000)), minlength=4).tolist()
    assert counts[1] == 0 and all(
        abs(n - 4000 * q) < 5 * (4000 * q * (1 - q)) ** 0.5 + 1 for n, q in zip(counts, p.tolist(), strict=True)
    )


def test_a_row_s_token_does_not_depend_on_the_other_rows():
    scores, keys = torch.randn(9, 6000, device=DEVICE), some_keys(9)
    alone = torch.cat([sampling.race(scores[i : i + 1], keys[i : i + 1]) for i in range(9)])
    assert torch.equal(sampling.race(scores, keys), alone)


def test_no_rows_need_no_launch():
    nothing = torch.zeros(0, 512, device=DEVICE)
    assert sampling.greatest(nothing)[1].shape == (0,)
    assert sampling.nucleus_floor(nothing, nothing[:, 0]).shape == (0,)
    assert sampling.race(nothing, nothing[:, :2].int()).shape == (0,)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert sampling.settle(nothing[:, 0], none, none, none).shape == (0,)


@pytest.mark.gpu
def test_after_the_warm_up_nothing_is_compiled():
    sampling.warm_sampling(128256, 70, torch.bfloat16, torch.device("cuda"))
    with compilations() as names:
        for rows in (1, 2, 3, 7, 16, 33, 70):
            p = probabilities(rows, 128512, 2.0)
            best, tokens = sampling.greatest(p[:, :128256].bfloat16())
            sampling.settle(best, tokens, torch.arange(rows, device=DEVICE), torch.zeros(256, device=DEVICE).long())
            sampling.nucleus_floor(p, torch.full((rows,), 0.9, device=DEVICE))
            sampling.race(p, some_keys(rows))
    assert not names


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: sampling.greatest(p[0]), r"scores must be \[S, V\]"),
        (lambda p: sampling.greatest(p.long()), "scores are torch.int64"),
        (lambda p: sampling.nucleus_floor(p.half(), p[:, 0]), "probabilities must be"),
        (lambda p: sampling.nucleus_floor(p, p[:1, 0]), "top_p must be"),
        (lambda p: sampling.settle(p[:, 0].contiguous(), p[:, 0].int(), p[:, 0].long(), p[0].long()), "int64"),
        (lambda p: sampling.settle(p[:, 0], p[0].long(), p[0].long(), p[0].long()), "must be"),
        (lambda p: sampling.race(p, p[:, :2].contiguous()), "keys must be"),
        (lambda p: sampling.race(p.half(), p[:, :2].int()), "scores are torch.float16"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        call(torch.rand(2, 512, device=DEVICE))
