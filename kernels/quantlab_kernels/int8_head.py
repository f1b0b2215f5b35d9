"""The output head at 8 bits: half the bytes of a 16-bit head, which at one token are a fifth of an INT4 model's.

Weight only, one symmetric scale a row of the vocabulary, made when a model is loaded. Knows nothing about models.
"""

import torch
from torch import Tensor

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.w4a16_layout import W4A16Weight, to_kernel

ROWS_AT_ONCE = 16384  # bounds the float32 copies that are made on the way


def int8_head(weight: Tensor) -> tuple[W4A16Weight, float]:
    """A 16-bit head [V, K] for `w4a16.w4a16_linear`, and the relative RMSE of its weight: 0.7 to 1 % for most models.

    Runs where `weight` is. Raises ValueError for a dtype without a kernel and for values that are not finite.
    """
    q = quantize_rows(weight)
    wrong = sum(
        ((codes * scales - rows.float()).double().square().sum().item())
        for codes, scales, rows in zip(*(t.split(ROWS_AT_ONCE) for t in (q.codes, q.scales, weight)), strict=True)
    )
    norm = sum(rows.double().square().sum().item() for rows in weight.split(ROWS_AT_ONCE))
    return to_kernel(q, weight.dtype, bits=8), (wrong / norm) ** 0.5 if norm else 0.0


def quantize_rows(weight: Tensor) -> QuantizedWeight:
    """Each row of [V, K] to 8-bit codes in -127..127 under the float32 scale absmax / 127; a row of zeros gets 1."""
    codes, scales = [], []
    for rows in weight.split(ROWS_AT_ONCE):
        wide = rows.float()
        scale = wide.abs().amax(dim=1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        codes.append((wide / scale).round_().to(torch.int8))
        scales.append(scale)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), None, weight.shape[1])
