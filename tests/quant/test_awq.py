"""The AWQ search: it lowers the error of the outputs, and leaves alone what it cannot help."""

import pytest
import torch
from torch import Tensor

from quantlab.quant.awq import search_scales
from quantlab.quant.grid import absmax_params, decode, nearest_codes
from quantlab.schemes import Scheme

SCHEMES = [Scheme("w4a16", 32), Scheme("w4a16", None), Scheme("w4a16", 32, symmetric=False)]


def salient(tokens: int = 512, columns: int = 128) -> Tensor:
    """Inputs with a few channels twenty times as large as the rest."""
    x = torch.randn(tokens, columns)
    x[:, ::40] *= 20.0
    return x


def rounded(w: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    params = absmax_params(w * scales, scheme, torch.bfloat16)
    return decode(nearest_codes(w * scales, *params, scheme), *params) / scales


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_scales_lower_the_error_of_the_real_outputs(scheme: Scheme) -> None:
    x, w = salient(), torch.randn(48, 128)
    scales = search_scales(w, x.t() @ x / len(x), scheme, 20, torch.bfloat16)
    errors = [(x @ (rounded(w, s, scheme) - w).t()).square().sum() for s in (torch.ones(128), scales)]
    assert errors[1] < 0.8 * errors[0]


def test_salient_channels_are_scaled_up() -> None:
    x = salient()
    scales = search_scales(torch.randn(48, 128), x.t() @ x / len(x), Scheme("w4a16", 32), 20, torch.bfloat16)
    assert scales[::40].min() > scales.median()


def test_the_loss_on_the_hessian_is_the_loss_on_the_tokens() -> None:
    """The best of the same candidates, by running the layer as the paper does, is the one that was found."""
    x, w, scheme = salient(), torch.randn(32, 128), Scheme("w4a16", 32)
    found = search_scales(w, x.t() @ x / len(x), scheme, 10, torch.bfloat16)
    size = x.square().mean(0).sqrt()
    groups = w.abs().unflatten(1, (4, 32))
    relative = (groups / groups.amax(-1, keepdim=True)).flatten(1).mean(0)
    candidates = [torch.ones(128)]
    for step in range(10):
        scales = size ** (step / 10) / (relative ** (1 - step / 10) + 1e-4)
        candidates.append(scales / (scales.max() * scales.min()).sqrt())
    losses = [float((x @ (rounded(w, s, scheme) - w).t()).square().sum()) for s in candidates]
    best = candidates[losses.index(min(losses))]
    assert torch.allclose(found, best, rtol=1e-4)


def test_the_search_never_prefers_what_is_worse_than_nothing() -> None:
    scheme = Scheme("w4a16", 32)
    for seed in range(5):
        torch.manual_seed(seed)
        x, w = torch.randn(200, 64), torch.randn(32, 64)
        scales = search_scales(w, x.t() @ x / len(x), scheme, 20, torch.bfloat16)
        errors = [(x @ (rounded(w, s, scheme) - w).t()).square().sum() for s in (torch.ones(64), scales)]
        assert errors[1] <= errors[0] * 1.0001


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dead_channels_and_zero_columns_give_finite_positive_scales(scheme: Scheme) -> None:
    x, w = salient(), torch.randn(16, 128)
    x[:, 5:9], w[:, 20:24], w[:, 64:96] = 0.0, 0.0, 0.0
    scales = search_scales(w, x.t() @ x / len(x), scheme, 20, torch.bfloat16)
    assert torch.isfinite(scales).all() and (scales > 0).all()
    silent = search_scales(w, torch.zeros(128, 128), scheme, 20, torch.bfloat16)
    assert torch.isfinite(silent).all() and (silent > 0).all()
