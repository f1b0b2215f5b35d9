"""From scores to a token: top-k, top-p, min-p and one draw a row, as pure functions on tensors.

A GPU has its own in `quantlab_kernels.sampling`. Scores are scaled so that a row's
greatest is 0; a row is padded with -inf to a multiple of BLOCK. Tokens that tie with the last one kept stay.
Knows nothing about requests, slots or seeds.
"""

import hashlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 512  # rows of scores are multiples of it
NucleusFloor = Callable[[Tensor, Tensor], Tensor]  # (probabilities [S, P], top_p [S]) -> the least one kept [S]
NOT_FINITE, NOTHING_LEFT = -1, -2  # what a row has in place of a token
_TINY = 1e-38
_CPU_AT_ONCE, _GPU_AT_ONCE = 1 << 18, 1 << 23  # scores of which noise is made at once: a cache's worth, 130 MB
_MASK = (1 << 64) - 1
_SHIFT, _BUCKETS = 19, 2048  # floats from 0 to 2 by their 11 leading bits


def stream(seed: int) -> int:
    """Where the numbers of `seed` begin, 64 bits: near seeds begin far from each other."""
    digest = hashlib.blake2b(struct.pack("<Q", seed & _MASK), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keys(begin: int, position: int) -> tuple[int, int]:
    """Number `position` of the stream that begins at `begin`, as two signed numbers of 32 bits.

    SplitMix64 (Steele, Lea and Flood 2014), whose numbers are a function of their place, in any order.
    """
    z = (begin + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return _signed(z ^ z >> 31), _signed((z ^ z >> 31) >> 32)


def _signed(value: int) -> int:
    """The lowest 32 bits as two's complement."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def padded(vocab_size: int) -> int:
    """Columns of a row of scores for `vocab_size` tokens."""
    return -(-vocab_size // BLOCK) * BLOCK


def keep_top_k(scores: Tensor, top_k: Tensor, greatest: int) -> None:
    """Mask, in place, what is below each row's k-th score.

    scores: [S, P] fp32; top_k: [S] int64, 0 for no limit; `greatest` is the largest of them, known to the host.
    """
    best = scores.topk(min(greatest, scores.shape[1]), dim=-1).values
    last = (top_k - 1).clamp(0, best.shape[1] - 1)
    floor = best.gather(1, last[:, None]).masked_fill_((top_k == 0)[:, None], -torch.inf)
    scores.masked_fill_(scores < floor, -torch.inf)


def keep_likely(scores: Tensor, top_p: Tensor | None, min_p: Tensor | None, nucleus_floor: NucleusFloor) -> None:
    """Mask, in place, what is outside each row's nucleus, and what is less likely than min_p times the likeliest.

    scores: [S, P] fp32; top_p, min_p: [S] fp32, None when no row asks. A token is in the nucleus when those likelier
    than it have less than top_p of the probability (Holtzman et al. 2020); 0 keeps the likeliest, 1 and more keep all.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    if top_p is not None:
        probabilities = scores.softmax(-1)
        wanted = top_p.clamp(min=_TINY).masked_fill(top_p >= 1, 2.0)
        keep = probabilities >= nucleus_floor(probabilities, wanted)[:, None]
    if min_p is not None:
        keep &= scores >= min_p.log()[:, None]
    scores.masked_fill_(~keep, -torch.inf)


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The least probability in each row's nucleus, fp32 [S]; 0 where all are.

    probabilities: [S, P] fp32 in 0..1; top_p: [S] fp32, above 0. Adds up the tokens by the leading bits of their
    probability first; then only those are sorted whose bits are those of the border, a sixteenth of an octave.
    """
    return torch.tensor([_floor(row, wanted) for row, wanted in zip(probabilities, top_p.tolist(), strict=True)])


def _floor(probabilities: Tensor, top_p: float) -> float:
    """The same of one row: rows one by one stay in a CPU's cache, ten times faster than all at once."""
    # Floats from 0 to 2 are in the order of their bits; a NaN must not reach beyond the last bucket.
    buckets = (probabilities.view(torch.int32) >> _SHIFT).clamp_(0, _BUCKETS - 1)
    mass = torch.bincount(buckets, weights=probabilities, minlength=_BUCKETS)
    likelier = mass.flip(0).cumsum(0).flip(0) - mass
    border = int((likelier < top_p).int().argmax())
    values = probabilities[buckets == border].sort(descending=True).values if border else probabilities[:0]
    if not len(values):  # all that is possible is kept; or all is NaN
        return 0.0
    before = likelier[border] + values.cumsum(0, dtype=torch.float64) - values
    return float(values[max(int((before < top_p).sum()), 1) - 1])


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest score of each row [S] and its place, int64 [S]; NaN where a row has one. scores: [S, V]."""
    value, place = scores.max(-1)
    return value, place


def settle(best: Tensor, tokens: Tensor, slots: Tensor, last: Tensor) -> Tensor:
    """The rows' tokens, or why there is none: NOTHING_LEFT where the greatest score is -inf, NOT_FINITE for NaN or inf.

    best: [S]; tokens, slots: [S] int64; last: [slots] int64, which gets each row's token at its slot, 0 for none.
    Returns [S] int64.
    """
    codes = torch.where(best == -torch.inf, NOTHING_LEFT, tokens)
    codes = torch.where(best.isnan() | (best == torch.inf), NOT_FINITE, codes)
    last.index_copy_(0, slots, codes.clamp(min=0))
    return codes


def race(scores: Tensor, keys: Tensor) -> Tensor:
    """A token a row, int64 [S], drawn with the probabilities softmax(scores).

    scores: [S, P] fp32, -inf for tokens that cannot come; keys: [S, 2] int32. The winner of a race of exponential
    clocks: token i rings after E_i / p_i. E_i is a function of a row's keys and i, so scores that differ a little
    (another batch, another sum) nearly always draw the same token; to invert the distribution function at one number
    would move tens of times as many tokens, since every border moves with all the probability before it.
    """
    rows = max(1, (_GPU_AT_ONCE if scores.is_cuda else _CPU_AT_ONCE) // scores.shape[1])
    parts = [_winners(scores[i : i + rows], keys[i : i + rows]) for i in range(0, len(scores), rows)]
    return torch.cat(parts) if parts else keys.new_empty(0, dtype=torch.int64)


def _winners(scores: Tensor, keys: Tensor) -> Tensor:
    """As `race`, for as many rows as are worked on at once."""
    h = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device).mul_(_signed(0x9E3779B1)) + keys[:, :1]
    _mix(h, 16, 0x85EBCA6B)
    h ^= keys[:, 1:]
    _mix(h, 13, 0xC2B2AE35)
    h ^= (h >> 16) & 0xFFFF
    # Small magnitudes keep all of their 31 bits: it is the early clocks that decide.
    early = h.float().abs_().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return early.neg_().log1p_().neg_().log_().neg_().add_(scores).argmax(-1)


def _mix(h: Tensor, shift: int, factor: int) -> None:
    """A round of MurmurHash3's finalizer in place; int32 multiplies as unsigned does, a shift must be made logical."""
    h ^= (h >> shift) & ((1 << 32 - shift) - 1)
    h.mul_(_signed(factor))
