"""The sampling kernels against sorts and sums in torch."""

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


@pytest.mark.parametrize(("rows", "columns"), [(1, 512), (2, 5120), pytest.param(70, 128512, marks=pytest.mark.gpu)])
def test_a_draw_inverts_the_distribution(rows: int, columns: int):
    p = probabilities(rows, columns, 3.0)
    p[:, ::3] = 0
    for u in (0.0, 1e-9, 0.3, 0.77, 1 - 2.0**-52):
        uniforms = torch.full((rows,), u, dtype=torch.float64, device=DEVICE)
        token = sampling.draw(p, uniforms)
        assert torch.equal(token, ref_sampling.draw(p, uniforms))
        assert bool((p.gather(1, token[:, None]) > 0).all())


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2], device=DEVICE).repeat(40, 1)
    p = torch.nn.functional.pad(p, (0, 508))
    uniforms = (torch.arange(40, dtype=torch.float64, device=DEVICE) + 0.5) / 40
    assert torch.bincount(sampling.draw(p, uniforms), minlength=4).tolist() == [20, 0, 12, 8]


def test_no_rows_need_no_launch():
    nothing = torch.zeros(0, 512, device=DEVICE)
    assert sampling.greatest(nothing)[1].shape == (0,)
    assert sampling.nucleus_floor(nothing, nothing[:, 0]).shape == (0,)
    assert sampling.draw(nothing, nothing[:, 0].double()).shape == (0,)


@pytest.mark.gpu
def test_after_the_warm_up_nothing_is_compiled():
    sampling.warm_sampling(128256, 70, torch.bfloat16, torch.device("cuda"))
    with compilations() as names:
        for rows in (1, 2, 3, 7, 16, 33, 70):
            p = probabilities(rows, 128512, 2.0)
            sampling.greatest(p[:, :128256].bfloat16())
            sampling.nucleus_floor(p, torch.full((rows,), 0.9, device=DEVICE))
            sampling.draw(p, torch.rand(rows, dtype=torch.float64, device=DEVICE))
    assert not names


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: sampling.greatest(p[0]), r"scores must be \[S, V\]"),
        (lambda p: sampling.greatest(p.long()), "scores are torch.int64"),
        (lambda p: sampling.nucleus_floor(p.half(), p[:, 0]), "probabilities must be"),
        (lambda p: sampling.nucleus_floor(p, p[:1, 0]), "top_p must be"),
        (lambda p: sampling.draw(p, p[:, 0].contiguous()), "uniforms must be"),
        (lambda p: sampling.draw(p[:, :100].contiguous(), p[:, 0].double()), "not a multiple of 512"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        call(torch.rand(2, 512, device=DEVICE))
