"""SmoothQuant: move the spread of activations into the weights so that both fit INT8.

Pure functions on tensors. Knows nothing about which layer takes the inverse; `folds` does.
The scales of a strength are then balanced: the noise of per-token INT8 is the token's largest channel times the size of
the weights, so at the optimum each channel is a token's largest as often as its share of the weights' energy.
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
    exact, w_absmax, w_norm = x @ w.t(), w.abs().amax(0), w.norm(dim=0)
    best, best_loss = torch.ones_like(x_absmax), _loss(w, x, torch.ones_like(x_absmax), exact, scheme, dtype)
    candidates = [smooth_scales(x_absmax, size, strength) for strength in strengths for size in (w_absmax, w_norm)]
    if len(strengths) > 1:
        candidates.append(balanced_scales(x, w_norm))
    for scales in candidates:
        loss = _loss(w, x, scales, exact, scheme, dtype)
        if loss < best_loss:
            best, best_loss = scales, loss
    return best


def balanced_scales(x: Tensor, w_norm: Tensor, steps: int = 60, sharpness: float = 12.0) -> Tensor:
    """Scales `[K]` that minimise the activations' rounding noise E[max_j (x_j/s_j)^2] * sum_j (s_j |w_j|)^2.

    x: [T, K] sampled inputs, w_norm: [K] column norms. Gradient descent on log s: the gradient is the share of channel
    j in the (softened) maximum less its share of the weights' energy.
    """
    magnitude = x.abs().clamp(min=1e-8)
    log_x, log_w = magnitude.log(), w_norm.clamp(min=1e-8).log()
    log_s = 0.5 * (magnitude.square().mean(0).sqrt().log() - log_w)
    for step in range(steps):
        relative = log_x - log_s
        largest = torch.softmax(sharpness * relative, 1)
        energy = torch.softmax(2 * relative.amax(1), 0)
        share = energy @ largest
        weight_share = torch.softmax(2 * (log_s + log_w), 0)
        rate = 0.3 * (1.0 - step / steps)
        log_s = log_s + rate * (share / (share + weight_share) - weight_share / (share + weight_share))
    return (log_s - log_s.mean()).exp()


def _loss(w: Tensor, x: Tensor, column_scales: Tensor, exact: Tensor, scheme: Scheme, dtype: torch.dtype) -> float:
    codes, token_scales = quantize_per_token(x / column_scales)
    scaled = w * column_scales
    scales, zeros = absmax_params(scaled, scheme, dtype)
    rounded = decode(nearest_codes(scaled, scales, zeros, scheme), scales, zeros)
    loss = float(((codes.float() * token_scales) @ rounded.t() - exact).square().mean())
    return loss if loss == loss else float("inf")
