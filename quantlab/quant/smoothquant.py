"""SmoothQuant: move the spread of activations into the weights so that both fit INT8.

Pure functions on tensors. Knows nothing about which layer takes the inverse; `folds` does.
s_j = max|x_j|^a / max|w_j|^(1-a) (arXiv 2211.10438, equation 4); the strength `a` is searched for each pair of layers
on the real quantized output error of sampled tokens, instead of one value for the whole model.
"""

import torch
from torch import Tensor

from quantlab.quant.grid import absmax_params, decode, nearest_codes
from quantlab.schemes import Scheme
from quantlab_kernels.ref import quantize_per_token


def smooth_scales(x_absmax: Tensor, w_absmax: Tensor, strength: float) -> Tensor:
    """The scales `[K]` of equation 4 from channel maxima `[K]`; inputs are divided and columns multiplied by them."""
    scales = x_absmax.clamp(min=1e-5) ** strength / w_absmax.clamp(min=1e-5) ** (1.0 - strength)
    return scales.clamp(min=1e-5)


def search_scales(
    w: Tensor, x: Tensor, x_absmax: Tensor, scheme: Scheme, strengths: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """The best of `smooth_scales` over `strengths`, and of no smoothing, for w: [N, K] on sampled inputs x: [T, K]."""
    exact, w_absmax = x @ w.t(), w.abs().amax(0)
    best, best_loss = torch.ones_like(x_absmax), _loss(w, x, torch.ones_like(x_absmax), exact, scheme, dtype)
    for strength in strengths:
        scales = smooth_scales(x_absmax, w_absmax, strength)
        loss = _loss(w, x, scales, exact, scheme, dtype)
        if loss < best_loss:
            best, best_loss = scales, loss
    return best


def _loss(w: Tensor, x: Tensor, column_scales: Tensor, exact: Tensor, scheme: Scheme, dtype: torch.dtype) -> float:
    codes, token_scales = quantize_per_token(x / column_scales)
    scaled = w * column_scales
    scales, zeros = absmax_params(scaled, scheme, dtype)
    rounded = decode(nearest_codes(scaled, scales, zeros, scheme), scales, zeros)
    loss = float(((codes.float() * token_scales) @ rounded.t() - exact).square().mean())
    return loss if loss == loss else float("inf")
