"""What the fused kernels mean, in plain torch: the text that `fused` is compared with; runs on any device."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from quantlab_kernels.ref import quantize_per_token


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x plus the residual, rounded; its rows at unit root mean square, rounded, times the weight. As `fused.rms_norm`.

    x, residual: [M, H]; weight: [H]; rows: [R] int64 or None. Returns the normed rows and the sums, [M or R, H] each.
    """
    if rows is not None:
        x, residual = x[rows], None if residual is None else residual[rows]
    summed = x if residual is None else x + residual
    wide = summed.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype), summed


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm`, then `quantize_per_token`: codes [M or R, H] int8, scales [M or R] fp32, the sums."""
    normed, summed = rms_norm(x, weight, eps, residual, rows)
    codes, scales = quantize_per_token(normed)
    return codes, scales[:, 0], summed


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, each rounded. gate_up: [M, 2I], gate first. Returns [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul_quantized(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul`, then `quantize_per_token`: codes [M, I] int8, scales [M] fp32."""
    codes, scales = quantize_per_token(silu_mul(gate_up))
    return codes, scales[:, 0]


def embed(ids: Tensor, table: Tensor, sampled: Tensor | None = None) -> Tensor:
    """Rows of `table: [V, H]` for `ids: [T]` int64, those below zero by way of `sampled: [slots]`. Returns [T, H]."""
    if sampled is not None:
        ids = torch.where(ids < 0, sampled[(-1 - ids).clamp_min(0)], ids)
    return table[ids]
