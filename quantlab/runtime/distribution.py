"""From scores to a token: top-k, top-p, min-p and one draw a row, as pure functions on tensors.

For a CPU; a GPU's `greatest`, `nucleus_floor` and `draw` are those of `quantlab_kernels.sampling`. Scores are scaled so
that a row's greatest is 0; a row is padded with -inf to a multiple of BLOCK. Tokens that tie with the last one kept are
kept as well.
Knows nothing about requests, slots or seeds.
"""

import hashlib
import struct
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 512  # columns summed at once by a draw
NucleusFloor = Callable[[Tensor, Tensor], Tensor]  # (probabilities [S, P], top_p [S]) -> the least one kept [S]
_TINY = 1e-38
_MASK = (1 << 64) - 1
_SHIFT, _BUCKETS = 19, 2048  # floats from 0 to 2 by their 11 leading bits


def stream(seed: int) -> int:
    """Where the numbers of `seed` begin, 64 bits: near seeds begin far from each other."""
    digest = hashlib.blake2b(struct.pack("<Q", seed & _MASK), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniform(begin: int, position: int) -> float:
    """Number `position` of the stream that begins at `begin`, in [0, 1): 52 bits, so that u * total < total always.

    SplitMix64 (Steele, Lea and Flood 2014), whose numbers are a function of their place, in any order.
    """
    z = (begin + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return ((z ^ z >> 31) >> 12) / (1 << 52)


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


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """A token a row by inverting the distribution function at `uniforms`; int64 [S].

    probabilities: [S, P] fp32, not necessarily of sum 1; uniforms: [S] fp64 in [0, 1 - 2^-52]. Sums by blocks first,
    and these in fp64, so that the tail of a large vocabulary keeps its probability. A token of probability 0 is never
    drawn.
    """
    blocks = probabilities.view(len(probabilities), -1, BLOCK)
    mass = blocks.sum(-1).double()
    ends = mass.cumsum(-1)
    target = (uniforms * ends[:, -1])[:, None]
    block = (ends <= target).sum(-1, keepdim=True).clamp_(max=mass.shape[1] - 1)
    rest = target - (ends - mass).gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    # Rounding may put the rest just outside the block, where only tokens of probability 0 would be left.
    rest = torch.minimum(rest.clamp_(min=0), inside[:, -1:] * (1 - 2.0**-50))
    return block[:, 0] * BLOCK + (inside <= rest).sum(-1).clamp_(max=BLOCK - 1)
