"""Moving a scale per channel from a group of linears into whatever feeds it, without changing the function.

Pure functions on tensors. Knows nothing about how scales are searched or which modules there are.
Norms take any scale, and the columns take exactly what the rounded norm gives back; so does a quantized linear with one
scale a row. One with several takes powers of two only, which divide its stored scales without rounding. Either way the
feeder keeps its codes.
"""

import torch
from torch import Tensor

MAX_EXPONENT = 6


def fold_into_norm(norm: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The norm weight divided by `scales: [K]`, in its own dtype, and the column scales [K] fp32 it amounts to."""
    divided = (norm.float() / scales).to(norm.dtype)
    usable = (divided != 0) & torch.isfinite(divided)
    divided = torch.where(usable, divided, norm)
    exact = torch.where(divided != 0, norm.float() / divided.float(), torch.ones_like(scales))
    return divided, exact


def powers_of_two(scales: Tensor) -> Tensor:
    """`scales: [C]` rounded to powers of two after their median is brought to one; within 2^-6 .. 2^6."""
    exponents = scales.log2()
    exponents = (exponents - exponents.median()).round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return exponents.exp2()


def per_kv_channel(scales: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Column scales of o_proj `[H*D]` -> one for each output of v_proj `[H_kv*D]`: the geometric mean over the query
    heads that share it."""
    return scales.log().view(kv_heads, heads // kv_heads, -1).mean(1).exp().flatten()


def per_query_channel(scales: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Scales of v_proj's outputs `[H_kv*D]` -> o_proj's columns `[H*D]`."""
    return scales.view(kv_heads, 1, -1).expand(-1, heads // kv_heads, -1).flatten()


def dividable(stored: Tensor, scales: Tensor) -> Tensor:
    """`scales: [C]` with 1 where dividing the rows of `stored: [C, G]` (scales as stored) would round them."""
    divided = (stored.float() / scales[:, None]).to(stored.dtype)
    exact = (divided.float() * scales[:, None] == stored.float()).all(1) & (divided != 0).all(1)
    return torch.where(exact, scales, torch.ones_like(scales))


def rounded_divisors(stored: Tensor, scales: Tensor) -> Tensor:
    """What dividing `stored: [C, 1]` (one scale a row) by `scales: [C]` really divides by, rounded to its dtype."""
    divided = (stored.float() / scales[:, None]).to(stored.dtype)
    exact = (stored.float() / divided.float())[:, 0]
    return torch.where(torch.isfinite(exact) & (exact != 0), exact, torch.ones_like(scales))


def divide_rows(stored: Tensor, scales: Tensor) -> Tensor:
    """`stored: [C, ...]` with row c divided by `scales[c]`, in its own dtype."""
    return (stored.float() / scales.view(-1, *[1] * (stored.dim() - 1))).to(stored.dtype)
