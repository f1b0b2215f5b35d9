"""The order in which kernels want a 4-bit or 8-bit weight, and the way there and back. Knows nothing about files.

One order serves every kernel: that of the A operand of mma.sync.m16n8k16, which is also, warp by warp, that of
wgmma.m64k16. The weight is cut into blocks of 64 rows by 64 columns, 2 KB each, [N/64, K/64]. In a block,

    row = 16 w + 8 b1 + r        column = 16 n + 8 b2 + 2 c + b0

is nibble n (bits 4n to 4n + 3) of the 16-bit word at [w, r, c, b2, b1, b0] (sizes 4, 8, 4, 2, 2, 2). So warp w reads
512 bytes in a row, thread 4 r + c of it 16 bytes, and these are its part of four A fragments, one a nibble. 8-bit codes
lie the same way, two in a word, in blocks of 64 rows by 32 columns.

A nibble q masked in place is a subnormal number: q * 2^-24 in float16, q * 2^-133 in bfloat16, exactly. Therefore a
scale s is stored as s * 2^(24 - t) (or 133 for 24), and fma(q, scale, -8 * scale) gives the weight, rounded once and
divided by 2^t. A byte in place is such a number, too: from 128 on, the exponent of the smallest normal ones is its top
bit. t puts the largest scale of the tensor at the top of the range; the sum over K is multiplied by 2^t. In
float16 a weight is then wrong by at most 2^-20 of the largest weight of its tensor where it would be subnormal.

Scales and zero points lie [N/64, K/group, r, w, b1]. A zero point is stored as the word that stands for minus its
value. N is padded to 64 and K to 128, with codes 0 under scales 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.layout import QuantizedWeight

ROWS, COLUMNS = 64, 64  # of a block
PADDED_COLUMNS = 128
GROUP_SIZES = (128, 64, 32)  # that the kernels know; others are cut into these
# 2^-24 and 2^-133 are the smallest subnormals: what the lowest bit of a word stands for.
SUBNORMAL_EXPONENT = {torch.float16: 24, torch.bfloat16: 133}


@dataclass(frozen=True, slots=True)
class W4A16Weight:
    """A weight [N, K] of 4-bit or 8-bit codes in kernel order.

    words: [N/64 * K/64 * 4 bits, 64] int16. scales: [N/64, K/group_size, 8, 4, 2] in the activations' dtype, divided by
    2^(exponent - subnormal exponent). zeros: like scales, int16, or None if symmetric. group_size: 32, 64 or 128.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    exponent: int
    out_features: int
    in_features: int
    group_size: int
    bits: int = 4

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations that this weight is for."""
        return self.scales.dtype

    @property
    def blocks(self) -> int:
        """Blocks of 64 rows."""
        return self.scales.shape[0]

    @property
    def chunks(self) -> int:
        """Blocks of 64 columns; even."""
        return self.scales.shape[1] * self.group_size // COLUMNS

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads of it."""
        return sum(t.nbytes for t in (self.words, self.scales, self.zeros) if t is not None)


def to_kernel(q: QuantizedWeight, dtype: torch.dtype, bits: int = 4) -> W4A16Weight:
    """Put `q`, a weight of 4-bit or 8-bit codes, in kernel order, for activations in `dtype` (float16 or bfloat16).

    Runs where `q` is, and ends only when the device has finished, since kernels may read weights before the launches
    ahead of them are done. Raises ValueError for a group size that is neither K nor a multiple of 32, for scales that
    are not finite, and for a dtype without a kernel.
    """
    if dtype not in SUBNORMAL_EXPONENT:
        raise ValueError(f"W4A16 kernels compute in float16 or bfloat16, not {dtype}")
    rows, columns = q.codes.shape
    size = kernel_group_size(q.group_size, columns)
    scales, exponent = _scale_words(_spread(q.scales, q, size), dtype)
    zeros = None if q.zeros is None else _zero_words(_spread(q.zeros, q, size), bits)
    weight = W4A16Weight(_code_words(q.codes, bits), scales, zeros, exponent, rows, columns, size, bits)
    if q.codes.is_cuda:
        torch.cuda.synchronize(q.codes.device)
    return weight


def from_kernel(weight: W4A16Weight) -> QuantizedWeight:
    """The inverse of `to_kernel`, with scales in the kernel's dtype and group size."""
    rows, columns, size = weight.out_features, weight.in_features, weight.group_size
    unsigned = _unsigned_codes(weight)[:rows, :columns]
    groups = -(-columns // size)
    unit = weight.exponent - SUBNORMAL_EXPONENT[weight.dtype]
    scales = (_rows_first(weight.scales).double() * 2.0**unit).to(weight.dtype)[:rows, :groups]
    zeros = None
    if weight.zeros is not None:
        stored = _rows_first(weight.zeros) & ((1 << weight.bits) - 1)
        zeros = (stored - (1 << weight.bits - 1)).to(torch.int8)[:rows, :groups].contiguous()
    signed = (unsigned.to(torch.int16) - (1 << weight.bits - 1)).to(torch.int8)
    if columns % size:  # one scale a row, and K is not a multiple of 128
        return QuantizedWeight(signed, scales[:, :1].contiguous(), None if zeros is None else zeros[:, :1], columns)
    return QuantizedWeight(signed, scales.contiguous(), zeros, size)


def fuse_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several that read the same input (q, k and v; gate and up), their rows one after the other.

    Raises ValueError unless they agree on K, group size, dtype of the scales and symmetry.
    """
    first = weights[0]
    kinds = {(w.codes.shape[1], w.group_size, w.scales.dtype, w.zeros is None) for w in weights}
    if len(kinds) > 1:
        raise ValueError(f"weights of different kinds cannot be fused: {sorted(map(str, kinds))}")
    zeros = None if first.zeros is None else torch.cat([w.zeros for w in weights if w.zeros is not None])
    codes, scales = (torch.cat([getattr(w, name) for w in weights]) for name in ("codes", "scales"))
    return QuantizedWeight(codes, scales, zeros, first.group_size)


def kernel_group_size(group_size: int, columns: int) -> int:
    """The largest group size of the kernels that cuts groups of `group_size` evenly."""
    if group_size == columns:
        return PADDED_COLUMNS
    for size in GROUP_SIZES:
        if group_size % size == 0:
            return size
    raise ValueError(f"W4A16 kernels take groups of a multiple of 32 columns or one group a row, not {group_size}")


def _spread(values: Tensor, q: QuantizedWeight, size: int) -> Tensor:
    """What there is one of a group (scales, zero points), once for each of the kernel's groups of `size` columns.

    values: [N, G]. Returns [N padded to 64, (K padded to 128) / size], with zeros where nothing is.
    """
    rows, columns = q.codes.shape
    wide = values.repeat_interleave(-(-q.group_size // size), dim=1)
    groups = -(-columns // PADDED_COLUMNS) * PADDED_COLUMNS // size
    return torch.nn.functional.pad(wide, (0, groups - wide.shape[1], 0, -rows % ROWS))


def _code_words(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    unsigned = codes.view(torch.uint8) ^ 128 if bits == 8 else (codes + 8).view(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -columns % PADDED_COLUMNS, 0, -rows % ROWS))
    if bits == 8:
        bytes_first = unsigned.view(-1, 4, 2, 8, unsigned.shape[1] // 32, 2, 2, 4, 2)  # [B, w, b1, r, C, n, b2, c, b0]
        return _in_word_order(bytes_first)
    cut = unsigned.view(-1, 4, 2, 8, unsigned.shape[1] // COLUMNS, 2, 2, 2, 4, 2)  # [B, w, b1, r, C, n1, n0, b2, c, b0]
    pairs = cut[:, :, :, :, :, :, 0] | cut[:, :, :, :, :, :, 1] << 4  # [B, w, b1, r, C, n1, b2, c, b0]: n1 is the byte
    return _in_word_order(pairs)


def _in_word_order(cut: Tensor) -> Tensor:
    """Bytes [B, w, b1, r, C, n, b2, c, b0], n the byte of a word, as words."""
    return cut.permute(0, 4, 1, 3, 7, 6, 2, 8, 5).contiguous().view(torch.int16).view(-1, COLUMNS)


def _unsigned_codes(weight: W4A16Weight) -> Tensor:
    """The codes as stored, [padded N, padded K] uint8."""
    cut = weight.words.view(torch.uint8).view(weight.blocks, -1, 4, 8, 4, 2, 2, 2, 2)  # [B, C, w, r, c, b2, b1, b0, n]
    if weight.bits == 8:
        return cut.permute(0, 2, 6, 3, 1, 8, 5, 4, 7).reshape(weight.blocks * ROWS, -1)
    nibbles = torch.stack((cut & 15, cut >> 4), dim=-1)  # [B, C, w, r, c, b2, b1, b0, n1, n0]
    return nibbles.permute(0, 2, 6, 3, 1, 8, 9, 5, 4, 7).reshape(weight.blocks * ROWS, -1)


def _scale_words(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Scales in kernel order and unit, and the exponent t of the module docstring."""
    largest = scales.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError("scales must be finite")
    subnormal = SUBNORMAL_EXPONENT[dtype]
    top = torch.finfo(dtype).max * 2.0**-subnormal
    exponent = math.ceil(math.log2(largest / top)) if largest else 0
    return _blocks_first((scales.double() * 2.0 ** (subnormal - exponent)).to(dtype)), exponent


def _zero_words(zeros: Tensor, bits: int) -> Tensor:
    return _blocks_first((zeros.to(torch.int16) + (1 << bits - 1)) | -0x8000)


def _blocks_first(values: Tensor) -> Tensor:
    """[padded N, G] to [N/64, G, r, w, b1]."""
    return values.view(-1, 4, 2, 8, values.shape[1]).permute(0, 4, 3, 1, 2).contiguous()


def _rows_first(values: Tensor) -> Tensor:
    """The inverse of `_blocks_first`."""
    return values.permute(0, 3, 4, 2, 1).reshape(-1, values.shape[1])
