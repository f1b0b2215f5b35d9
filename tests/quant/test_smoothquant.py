"""SmoothQuant: the paper's formula, and a search that helps the outputs that engines compute."""

import pytest
import torch
from torch import Tensor

from quantlab.quant.grid import absmax_params, nearest_codes
from quantlab.quant.smoothquant import Inputs, balanced_scales, search_scales, smooth_scales, strided
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import w8a8_linear

W8 = Scheme("w8a8", None)
STRENGTHS = tuple(i / 10 for i in range(1, 10))


def outliers(tokens: int = 256, columns: int = 64) -> Tensor:
    x = torch.randn(tokens, columns)
    x[:, [3, 40]] *= 60.0
    return x


def inputs(x: Tensor) -> Inputs:
    return Inputs(x, x.abs().amax(0), x.square().mean(0))


def gated(tokens: int, seed: int) -> Tensor:
    """What a gated layer gives its last projection: products, so that every token has a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(256, generator=torch.Generator().manual_seed(1)).mul(0.7).exp()
    first, second = torch.randn(2, tokens, 256, generator=generator).unbind()
    return torch.nn.functional.silu(2 * first) * second * sizes


def output_error(w: Tensor, x: Tensor, scales: Tensor) -> Tensor:
    """Squared error of the INT8 layer with inputs divided and columns multiplied by `scales`."""
    stored, _ = absmax_params(w * scales, W8, torch.bfloat16)
    q = QuantizedWeight(nearest_codes(w * scales, stored, None, W8), stored, None, w.shape[1])
    return (w8a8_linear(x / scales, q, None) - x @ w.t()).square().sum()


def test_the_formula_is_equation_four() -> None:
    x, w = torch.rand(16) + 0.1, torch.rand(16) + 0.1
    assert torch.allclose(smooth_scales(x, w, 0.5), (x / w).sqrt())
    assert torch.allclose(smooth_scales(x, w, 1.0), x)
    assert torch.allclose(smooth_scales(x, w, 0.0), 1 / w)


def test_the_search_helps_an_input_with_outliers() -> None:
    x, w = outliers(), torch.randn(32, 64)
    scales = search_scales(w, inputs(x), W8, STRENGTHS, torch.bfloat16)
    assert output_error(w, x, scales) < 0.2 * output_error(w, x, torch.ones(64))


def test_the_search_never_prefers_what_is_worse_than_nothing() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x, w = torch.randn(200, 64), torch.randn(32, 64)
        scales = search_scales(w, inputs(x), W8, STRENGTHS, torch.bfloat16)
        assert output_error(w, x, scales) <= output_error(w, x, torch.ones(64)) * 1.02


@pytest.mark.parametrize("dead", ["inputs", "weights", "both"])
def test_dead_channels_give_finite_positive_scales(dead: str) -> None:
    x, w = outliers(), torch.randn(32, 64)
    if dead != "weights":
        x[:, 10] = 0.0
    if dead != "inputs":
        w[:, 10] = 0.0
    scales = search_scales(w, inputs(x), W8, STRENGTHS, torch.bfloat16)
    assert torch.isfinite(scales).all() and (scales > 0).all()


def test_balanced_scales_fit_tokens_that_they_were_not_made_from() -> None:
    torch.manual_seed(3)
    w, other = torch.randn(96, 256), gated(4096, 7)
    few, many = gated(256, 5), gated(32768, 6)
    from_few, from_many = (float(output_error(w, other, balanced_scales(w, inputs(x)))) for x in (few, many))
    assert from_many < 0.95 * from_few
    assert from_many < 0.6 * float(output_error(w, other, torch.ones(256)))


def test_balanced_scales_spare_a_weight_matrix_whose_columns_differ() -> None:
    torch.manual_seed(4)
    w, x = torch.randn(96, 256), torch.randn(8192, 256)
    w[:, :8] *= 20.0
    found = balanced_scales(w, inputs(x))
    assert output_error(w, x[:1024], found) < 0.7 * output_error(w, x[:1024], torch.ones(256))
    assert found[:8].mean() < 0.5 * found[8:].mean()


@pytest.mark.parametrize(("rows", "count", "number", "picked"), [(10, 3, 0, [0, 3, 6, 9]), (10, 3, 4, [1, 4, 7])])
def test_samples_are_spread_evenly(rows: int, count: int, number: int, picked: list[int]) -> None:
    assert strided(torch.arange(rows)[:, None], count, number)[:, 0].tolist() == picked
