"""Scales, zero points and nearest codes of one weight matrix: pure functions on tensors.

Knows nothing about Hessians beyond a per-column importance, and nothing about files or models.
Every scale is rounded to the dtype it is stored in before any code is chosen with it, because a reader multiplies by
the stored value.
"""

import torch
from torch import Tensor

from quantlab.schemes import Scheme

# Rows searched at a time: the search reads each weight once per candidate, so a chunk should stay in the L2 cache.
CHUNK_ELEMENTS = 1 << 18
SHRINK = tuple(0.60 + 0.03 * i for i in range(19))


def grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """`w: [N, K]` seen as `[N, G, K/G]`, one slice a scale."""
    return w.unflatten(1, (scheme.groups(w.shape[1]), -1))


def levels(codes: Tensor, zeros: Tensor | None) -> Tensor:
    """`codes: [N, K]` less their group's zero point `zeros: [N, G]`, as fp32 multiples of the scale `[N, K]`."""
    if zeros is None:
        return codes.float()
    spread = codes.shape[1] // zeros.shape[1]
    return codes.float() - zeros.float().repeat_interleave(spread, dim=1)


def spread_groups(per_group: Tensor, columns: int) -> Tensor:
    """`per_group: [N, G]` repeated over each group's columns, fp32 `[N, K]`."""
    return per_group.float().repeat_interleave(columns // per_group.shape[1], dim=1)


def absmax_params(w: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales `[N, G]` of `dtype` (and zeros int8 `[N, G]` when asymmetric) that span each group of `w: [N, K]` fp32.

    Symmetric: absmax / ((2^bits - 1) / 2). Asymmetric: (max - min) / (2^bits - 1), with min <= 0 <= max
    (the compressed-tensors defaults, so that RTN here means what it means there).
    """
    w3 = grouped(w, scheme)
    steps = scheme.code_max - scheme.code_min
    if scheme.symmetric:
        return _stored(w3.abs().amax(-1) / (steps / 2), dtype), None
    low, high = w3.amin(-1).clamp(max=0.0), w3.amax(-1).clamp(min=0.0)
    scales = _stored((high - low) / steps, dtype)
    return scales, _zero_points(low, scales, scheme)


def searched_params(
    w: Tensor, importance: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The spans of `absmax_params`, each shrunk or stretched to the least weighted squared rounding error.

    w: [N, K] fp32; importance: [K] fp32, the mean square of each input channel (the Hessian's diagonal), or None for
    plain squared error. A symmetric scale may be negative: the side with the larger extreme gets the extra code.
    """
    if importance is not None:  # inputs never seen still count a little, lest their weights be clipped for nothing
        importance = importance.clamp(min=1e-6 * float(importance.mean()) or 1.0)
    rows = max(1, CHUNK_ELEMENTS // w.shape[1])
    parts = [_search_rows(chunk, importance, scheme, dtype) for chunk in w.split(rows)]
    scales = torch.cat([p[0] for p in parts])
    return scales, None if scheme.symmetric else torch.cat([p[1] for p in parts])


def nearest_codes(w: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Signed codes int8 `[N, K]` nearest to `w: [N, K]` fp32 (half to even), given `scales, zeros: [N, G]`."""
    q = w / spread_groups(scales, w.shape[1])
    if zeros is not None:
        q = q + spread_groups(zeros, w.shape[1])
    return q.round_().clamp_(scheme.code_min, scheme.code_max).to(torch.int8)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The fp32 matrix `[N, K]` that `codes` with `scales, zeros: [N, G]` stand for."""
    return levels(codes, zeros) * spread_groups(scales, codes.shape[1])


def _search_rows(w: Tensor, importance: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w3 = grouped(w, scheme)
    weight = torch.ones_like(w3[:1]) if importance is None else grouped(importance[None], scheme)
    low, high = w3.amin(-1), w3.amax(-1)
    best_error = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low, dtype=dtype), torch.zeros_like(low, dtype=torch.int8)
    for shrink in SHRINK:
        scale, zero = _candidate(low, high, shrink, scheme, dtype)
        q = w3 / scale.float()[..., None]
        if zero is not None:
            q = q + zero.float()[..., None]
        q = q.round_().clamp_(scheme.code_min, scheme.code_max)
        if zero is not None:
            q -= zero.float()[..., None]
        error = ((q * scale.float()[..., None]).sub_(w3).square_() * weight).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = best_zero if zero is None else torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidate(
    low: Tensor, high: Tensor, shrink: float, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if scheme.symmetric:
        extreme = torch.where(high > -low, -high, -low)  # the larger side is mapped to code_min
        return _stored(extreme * (shrink / -scheme.code_min), dtype), None
    low, high = low.clamp(max=0.0) * shrink, high.clamp(min=0.0) * shrink
    scales = _stored((high - low) / (scheme.code_max - scheme.code_min), dtype)
    return scales, _zero_points(low, scales, scheme)


def _zero_points(low: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    zeros = (scheme.code_min - low / scales.float()).round()
    return zeros.clamp(scheme.code_min, scheme.code_max).to(torch.int8)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` as stored; a group of zeros gets the scale 1, because a reader may refuse or divide by zero."""
    stored = scales.to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)
