"""What the sampling kernels mean, in plain torch, with a sort: the text that `sampling` is compared with."""

import torch
from torch import Tensor

MASK = (1 << 32) - 1


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of `scores: [S, V]`, fp32 [S], and its first column, int64 [S]; NaN if a row has one."""
    value = scores.float().amax(-1)
    return value, (scores.float() == value[:, None]).int().argmax(-1)


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The least probability in each row's nucleus (arXiv 1904.09751): a token is in it when those likelier than it have
    less than top_p together. probabilities: [S, P] fp32; top_p: [S] fp32, above 0. Returns [S] fp32."""
    falling = probabilities.sort(-1, descending=True).values
    likelier = falling.double().cumsum(-1) - falling.double()
    # Of equals the first has the least in front of it, so that all of them are in or out together.
    count = (likelier < top_p[:, None].double()).sum(-1, keepdim=True)
    return falling.gather(1, count - 1)[:, 0]


def settle(best: Tensor, tokens: Tensor, slots: Tensor, last: Tensor) -> Tensor:
    """The rows' tokens, or -2 where the greatest score is -inf and -1 where it is NaN or inf; last[slots] = those >= 0.

    best: [S] fp32; tokens, slots: [S] int64; last: [slots] int64, 0 at the slots without a token. Returns [S] int64.
    """
    codes = torch.where(best == -torch.inf, -2, tokens)
    codes = torch.where(best.isnan() | (best == torch.inf), -1, codes)
    last[slots] = codes.clamp(min=0)
    return codes


def race(scores: Tensor, keys: Tensor) -> Tensor:
    """The token of each row whose exponential clock E / p rings first, int64 [S], p = softmax(scores).

    scores: [S, P] fp32; keys: [S, 2] int32. With u in (0, 1) from 31 bits of a hash of the row's keys and the token's
    place (MurmurHash3's finalizer), E = -ln(1 - u); the first to ring has the greatest score - ln E.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    first, second = (keys[:, i : i + 1].long() & MASK for i in (0, 1))
    h = (place * 0x9E3779B1 + first) & MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h ^= second
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    h ^= h >> 16
    size = torch.where(h >= 1 << 31, (1 << 32) - h, h)
    u = ((size.double() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return (scores.double() - (-torch.log1p(-u)).log()).argmax(-1)
