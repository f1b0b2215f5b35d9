"""SmoothQuant: move the spread of activations into the weights so that both fit INT8.

Pure functions on tensors. Knows nothing about which layer takes the inverse; `folds` does.
s_j = max|x_j|^a / max|w_j|^(1-a) (arXiv 2211.10438, equation 4); the strength `a` is searched for each pair of layers
on the real quantized output error of sampled tokens, instead of one value for the whole model. Beside these stand
scales that balance the noise itself: that of per-token INT8 is the token's largest channel times the size of the
weights, that of the weights the row's largest column times the size of the inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.quant.grid import absmax_params, decode, nearest_codes
from quantlab.schemes import Scheme
from quantlab_kernels.ref import quantize_per_token

# Tokens and weight rows in one look at what the scales do.
SAMPLE_TOKENS, SAMPLE_ROWS = 1024, 512
# Exponent of the maximum's softening.
SHARPNESS = 12.0
TINY = 1e-8


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of a group's input: all `tokens: [T, K]` that may be seen, floating; the largest magnitude
    `absmax: [K]` and the mean square `mean_square: [K]` of each channel, fp32."""

    tokens: Tensor
    absmax: Tensor
    mean_square: Tensor

    def sample(self, number: int) -> Tensor:
        """About SAMPLE_TOKENS evenly spaced tokens, fp32; other ones for another number, as far as there are any."""
        return strided(self.tokens, SAMPLE_TOKENS, number).float()


def strided(rows: Tensor, count: int, number: int) -> Tensor:
    """About `count` evenly spaced ones of `rows: [T, K]`, from the `number`-th on; all if there are fewer."""
    stride = max(1, len(rows) // count)
    return rows[number % stride :: stride]


def smooth_scales(x_absmax: Tensor, w_absmax: Tensor, strength: float) -> Tensor:
    """The scales `[K]` of equation 4 from channel maxima `[K]`; inputs are divided and columns multiplied by them."""
    scales = x_absmax.clamp(min=1e-5) ** strength / w_absmax.clamp(min=1e-5) ** (1.0 - strength)
    return scales.clamp(min=1e-5)


def search_scales(
    w: Tensor, inputs: Inputs, scheme: Scheme, strengths: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """The best scales `[K]` for w: [N, K]: `smooth_scales` over `strengths`, balanced ones, or none at all."""
    x = inputs.sample(0)
    exact, w_absmax, w_norm = x @ w.t(), w.abs().amax(0), w.norm(dim=0)
    none = torch.ones_like(w_absmax)
    best, best_loss = none, _loss(w, x, none, exact, scheme, dtype)
    candidates = [smooth_scales(inputs.absmax, size, strength) for strength in strengths for size in (w_absmax, w_norm)]
    if len(strengths) > 1:
        candidates.append(balanced_scales(w, inputs))
    for scales in candidates:
        loss = _loss(w, x, scales, exact, scheme, dtype)
        if loss < best_loss:
            best, best_loss = scales, loss
    return best


def balanced_scales(w: Tensor, inputs: Inputs, steps: int = 60) -> Tensor:
    """Scales `[K]` that minimise the rounding noise of inputs and of w: [N, K] together, up to a common factor.

    E_t[max_j (x_tj / s_j)^2] sum_j s_j^2 |w_j|^2 + sum_i max_j (s_j w_ij)^2 sum_j E[x_j^2] / s_j^2,
    by gradient descent on log s, each step on other tokens and rows: a maximum tells of one channel, and scales fitted
    to 1,024 tokens had half as much noise again on others.
    """
    log_w = w.norm(dim=0).clamp(min=TINY).log()
    log_x = 0.5 * inputs.mean_square.clamp(min=TINY**2).log()
    log_s = 0.5 * (log_x - log_w)
    for step in range(steps):
        largest, of_inputs = _shares(inputs.sample(step).abs().clamp(min=TINY).log() - log_s)
        widest, of_rows = _shares(strided(w, SAMPLE_ROWS, step).abs().clamp(min=TINY).log() + log_s)
        w_energy, x_energy = 2 * (log_s + log_w), 2 * (log_x - log_s)
        from_inputs = largest.mean().log() + w_energy.logsumexp(0)
        from_weights = widest.mean().log() + math.log(len(w)) + x_energy.logsumexp(0)
        ratio = (from_weights - from_inputs).exp()
        falling = of_inputs + ratio * torch.softmax(x_energy, 0)  # what a larger s_j makes smaller
        rising = torch.softmax(w_energy, 0) + ratio * of_rows
        log_s = log_s + 0.3 * (1.0 - step / steps) * (falling - rising) / (falling + rising)
    return (log_s - log_s.mean()).exp()


def _shares(log_size: Tensor) -> tuple[Tensor, Tensor]:
    """Squared maxima `[T]` of rows of logarithms [T, K], and the (softened) share `[K]` of each channel in them."""
    largest = 2 * log_size.amax(1)
    return largest.exp(), torch.softmax(largest, 0) @ torch.softmax(SHARPNESS * log_size, 1)


def _loss(w: Tensor, x: Tensor, column_scales: Tensor, exact: Tensor, scheme: Scheme, dtype: torch.dtype) -> float:
    codes, token_scales = quantize_per_token(x / column_scales)
    scaled = w * column_scales
    scales, zeros = absmax_params(scaled, scheme, dtype)
    rounded = decode(nearest_codes(scaled, scales, zeros, scheme), scales, zeros)
    loss = float(((codes.float() * token_scales) @ rounded.t() - exact).square().mean())
    return loss if loss == loss else float("inf")
