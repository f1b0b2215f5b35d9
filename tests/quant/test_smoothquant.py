"""SmoothQuant: the paper's formula, and a search that helps the outputs that engines compute."""

import pytest
import torch
from torch import Tensor

from quantlab.quant.grid import absmax_params, nearest_codes
from quantlab.quant.smoothquant import search_scales, smooth_scales
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import w8a8_linear

W8 = Scheme("w8a8", None)
STRENGTHS = tuple(i / 10 for i in range(1, 10))


def outliers(tokens: int = 256, columns: int = 64) -> Tensor:
    x = torch.randn(tokens, columns)
    x[:, [3, 40]] *= 60.0
    return x


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
    scales = search_scales(w, x, x.abs().amax(0), W8, STRENGTHS, torch.bfloat16)
    assert output_error(w, x, scales) < 0.2 * output_error(w, x, torch.ones(64))


def test_the_search_never_prefers_what_is_worse_than_nothing() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        x, w = torch.randn(200, 64), torch.randn(32, 64)
        scales = search_scales(w, x, x.abs().amax(0), W8, STRENGTHS, torch.bfloat16)
        assert output_error(w, x, scales) <= output_error(w, x, torch.ones(64)) * 1.02


@pytest.mark.parametrize("dead", ["inputs", "weights", "both"])
def test_dead_channels_give_finite_positive_scales(dead: str) -> None:
    x, w = outliers(), torch.randn(32, 64)
    if dead != "weights":
        x[:, 10] = 0.0
    if dead != "inputs":
        w[:, 10] = 0.0
    scales = search_scales(w, x, x.abs().amax(0), W8, STRENGTHS, torch.bfloat16)
    assert torch.isfinite(scales).all() and (scales > 0).all()
