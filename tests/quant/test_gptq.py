"""The solve against the textbook, descent against its objective, the corrected target against least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.errors import SolveError
from quantlab.quant.gptq import corrected_target, descend, factorize, output_error, solve
from quantlab.quant.grid import absmax_params, decode, nearest_codes, searched_params, spread_groups
from quantlab.schemes import Scheme

SCHEMES = [
    Scheme("w4a16", 32),
    Scheme("w4a16", None),
    Scheme("w4a16", 32, symmetric=False),
    Scheme("w4a16", None, symmetric=False),
    Scheme("w8a8", None),
]
DAMPING = 0.01


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.randn(columns, generator=generator).exp()
    return torch.randn(tokens, columns, generator=generator) @ mix * sizes


def hessian(tokens: int = 512, columns: int = 128, seed: int = 0) -> Tensor:
    x = inputs(tokens, columns, seed)
    return x.t() @ x / tokens


def textbook(w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, order: Tensor) -> Tensor:
    """GPTQ as its paper has it (arXiv 2210.17323, algorithm 1), in fp64: the inverse Hessian's upper Cholesky factor,
    and each column's error spread over the columns that are still to come."""
    w, h = w.double()[:, order], h.double()[order][:, order]
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    step = spread_groups(scales, w.shape[1]).double()[:, order]
    zero = torch.zeros_like(step) if zeros is None else spread_groups(zeros, w.shape[1]).double()[:, order]
    codes = torch.zeros_like(w)
    for i in range(w.shape[1]):
        q = (w[:, i] / step[:, i] + zero[:, i]).round().clamp(scheme.code_min, scheme.code_max)
        codes[:, i] = q
        error = (w[:, i] - (q - zero[:, i]) * step[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out.to(torch.int8)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("grid", [absmax_params, searched_params])
def test_solve_equals_the_textbook(grid: object, scheme: Scheme, activation_order: bool) -> None:
    w, h = torch.randn(24, 128), hessian()
    scales, zeros = absmax_params(w, scheme, torch.bfloat16)
    if grid is searched_params:  # its scales may be negative
        scales, zeros = searched_params(w, h.diagonal(), scheme, torch.bfloat16)
    factor = factorize(h, DAMPING, activation_order)
    ours = solve(w, factor, scales, zeros, scheme, block_size=32)
    theirs = textbook(w, h, scales, zeros, scheme, factor.order.flip(0))
    # fp32 against fp64: a code at a rounding boundary may fall either way, and its row goes on differently.
    assert (ours == theirs).all(1).float().mean() >= 0.9
    ratio = (
        output_error(decode(ours, scales, zeros) - w, h).sum()
        / output_error(decode(theirs, scales, zeros) - w, h).sum()
    )
    assert ratio == pytest.approx(1.0, abs=0.01)


def test_activation_order_is_that_of_the_diagonal_and_groups_stay_where_they_were() -> None:
    h = hessian()
    factor = factorize(h, DAMPING, activation_order=True)
    assert (h.diagonal()[factor.order].diff() >= 0).all()  # the largest is rounded first, and is the last
    assert torch.equal(factorize(h, DAMPING, activation_order=False).order, torch.arange(128).flip(0))
    scheme, w = Scheme("w4a16", 32), torch.randn(8, 128)
    scales, _ = absmax_params(w, scheme, torch.float32)
    error = decode(solve(w, factor, scales, None, scheme), scales, None) - w
    assert (
        output_error(error, h).sum()
        < output_error(decode(nearest_codes(w, scales, None, scheme), scales, None) - w, h).sum()
    )


def test_the_factor_is_that_of_the_damped_hessian() -> None:
    h = hessian()
    factor = factorize(h, 0.03, activation_order=True)
    rebuilt = factor.lower @ factor.lower.t()
    wanted = h[factor.order][:, factor.order] + 0.03 * h.diagonal().mean() * torch.eye(128)
    assert torch.equal(factor.lower, factor.lower.tril())
    assert (factor.damping, factor.retries) == (0.03, 0)
    assert torch.allclose(rebuilt, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [8, 48, 128, 1024])
def test_the_block_size_does_not_change_the_answer(block_size: int) -> None:
    w, h, scheme = torch.randn(16, 128), hessian(), Scheme("w4a16", 32)
    scales, _ = absmax_params(w, scheme, torch.float32)
    factor = factorize(h, DAMPING, activation_order=True)
    whole, blocks = (solve(w, factor, scales, None, scheme, size) for size in (128, block_size))
    assert (whole == blocks).float().mean() > 0.99


def test_uncorrelated_inputs_leave_nothing_to_feed_back() -> None:
    w, scheme = torch.randn(16, 64), Scheme("w4a16", 32)
    scales, _ = absmax_params(w, scheme, torch.float32)
    codes = solve(w, factorize(torch.rand(64).diag(), DAMPING, True), scales, None, scheme)
    assert torch.equal(codes, nearest_codes(w, scales, None, scheme))


def test_a_hessian_that_is_not_definite_is_damped_until_it_is_and_the_retries_are_told() -> None:
    h = hessian()
    h -= 2.0 * torch.linalg.eigvalsh(h)[0] * torch.eye(128) + 0.02 * h.diagonal().mean() * torch.eye(128)
    factor = factorize(h, 0.001, activation_order=False)
    assert factor.retries > 0
    assert factor.damping == pytest.approx(0.001 * 2**factor.retries)


def test_a_hopeless_hessian_is_an_error() -> None:
    with pytest.raises(SolveError, match="could not be factorized"):
        factorize(-torch.eye(16), 0.01, activation_order=False)
    with pytest.raises(SolveError):
        factorize(torch.full((16, 16), float("nan")), 0.01, activation_order=False)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dead_channels_and_fewer_tokens_than_channels_do_no_harm(scheme: Scheme) -> None:
    x = inputs(40, 128)
    x[:, 3:40] = 0.0
    w, h = torch.randn(16, 128), x.t() @ x / len(x)
    scales, zeros = searched_params(w, h.diagonal(), scheme, torch.bfloat16)
    codes = solve(w, factorize(h, DAMPING, True), scales, zeros, scheme)
    assert scheme.code_min <= codes.min() and codes.max() <= scheme.code_max
    plain = decode(nearest_codes(w, scales, zeros, scheme), scales, zeros) - w
    assert output_error(decode(codes, scales, zeros) - w, h).sum() < output_error(plain, h).sum()


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, e = inputs(300, 64), torch.randn(10, 64)
    wanted = (x @ e.t()).square().mean(0)
    assert torch.allclose(output_error(e, x.t() @ x / 300), wanted, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), scheme=st.sampled_from(SCHEMES), start=st.sampled_from(["nearest", "gptq", "bad"]))
def test_descent_never_raises_the_objective(seed: int, scheme: Scheme, start: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, h = torch.randn(12, 64, generator=generator), hessian(200, 64, seed)
    h.diagonal().add_(0.01 * h.diagonal().mean())
    scales, zeros = searched_params(w, h.diagonal(), scheme, torch.bfloat16)
    codes = nearest_codes(w, scales, zeros, scheme)
    if start == "gptq":
        codes = solve(w, factorize(h, DAMPING, True), scales, zeros, scheme)
    elif start == "bad":
        codes = torch.randint(scheme.code_min, scheme.code_max + 1, w.shape, generator=generator, dtype=torch.int8)
    before = output_error(decode(codes, scales, zeros) - w, h)
    for _ in range(3):
        codes, scales = descend(w, h, codes, scales, zeros, scheme)
        after = output_error(decode(codes, scales, zeros) - w, h)
        assert (after <= before * (1 + 1e-4) + 1e-6).all()
        before = after
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert scheme.code_min <= codes.min() and codes.max() <= scheme.code_max
    assert (scales != 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent_improves_on_gptq_and_keeps_negative_scales_usable(scheme: Scheme) -> None:
    w, h = torch.randn(24, 128), hessian()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    scales, zeros = searched_params(w, h.diagonal(), scheme, torch.bfloat16)
    assert zeros is not None or (scales < 0).any()
    first = codes = solve(w, factorize(h, DAMPING, True), scales, zeros, scheme)
    better, moved = codes, scales
    for _ in range(4):
        better, moved = descend(w, h, better, moved, zeros, scheme)
    before, after = output_error(decode(first, scales, zeros) - w, h), output_error(decode(better, moved, zeros) - w, h)
    assert after.sum() < 0.97 * before.sum()


def test_the_corrected_target_is_the_least_squares_answer() -> None:
    """x: what the quantized model feeds in; y: what the 16-bit model put out for the same tokens."""
    x, w = inputs(600, 48), torch.randn(20, 48)
    y = (x + 0.3 * torch.randn_like(x)) @ w.t()
    h, residual = x.t() @ x / len(x), x.t() @ (y - x @ w.t()) / len(x)
    factor = factorize(h, 1e-7, activation_order=True)
    wanted = torch.linalg.lstsq(x.double(), y.double()).solution.t().float()
    assert torch.allclose(corrected_target(w, residual, factor, 1.0), wanted, rtol=1e-3, atol=1e-3)
    halfway = corrected_target(w, residual, factor, 0.5)
    assert torch.allclose(halfway, (w + wanted) / 2, rtol=1e-3, atol=1e-3)
    assert torch.equal(corrected_target(w, residual, factor, 0.0), w)
