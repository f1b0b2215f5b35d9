"""AWQ scale search: scale input channels up before rounding where a rounding error would cost most.

Pure functions on tensors. Knows nothing about which layer takes the inverse; `folds` does.
AWQ (arXiv 2306.00978, section 3.2) searches by running the layer; here the loss is tr(E H E^T) on the Hessian, which
is the same squared output error without a forward pass.
"""

import torch
from torch import Tensor

from quantlab.quant.gptq import output_error
from quantlab.quant.grid import absmax_params, decode, grouped, nearest_codes
from quantlab.schemes import Scheme


def search_scales(w: Tensor, h: Tensor, scheme: Scheme, grid_points: int, dtype: torch.dtype) -> Tensor:
    """Scales `[K]` fp32 by which the columns of `w: [N, K]` fp32 are multiplied, from the Hessian `h: [K, K]`.

    Candidates are x^a / w^(1-a) for a on a grid of `grid_points`, x the root mean square input and w the mean relative
    size of a column within its group; all ones competes too.
    """
    x = h.diagonal().clamp(min=0.0).sqrt()
    w3 = grouped(w.abs(), scheme)
    relative = (w3 / w3.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0)
    best, best_loss = torch.ones_like(x), _loss(w, h, torch.ones_like(x), scheme, dtype)
    for step in range(grid_points):
        a = step / grid_points
        scales = (x**a / (relative ** (1.0 - a) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = _loss(w, h, scales, scheme, dtype)
        if loss < best_loss:
            best, best_loss = scales, loss
    return best


def _loss(w: Tensor, h: Tensor, column_scales: Tensor, scheme: Scheme, dtype: torch.dtype) -> float:
    scaled = w * column_scales
    scales, zeros = absmax_params(scaled, scheme, dtype)
    error = decode(nearest_codes(scaled, scales, zeros, scheme), scales, zeros) / column_scales - w
    loss = float(output_error(error, h).sum())
    return loss if loss == loss else float("inf")
