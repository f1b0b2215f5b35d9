"""The bits of a quantized weight: codes, scales and zero points, and the int32 words that hold them on disk.

This is the one place that knows the nibble order. It knows nothing about files, schemes or models.
Words are those of the compressed-tensors `pack-quantized` layout: an element is stored unsigned (code + 2^(bits-1)),
element k of a row in word k // per_word at bits `bits * (k % per_word)` and up, least significant first; a row whose
length does not fill its last word ends in zero bits. Packing goes through bytes, so the host must be little-endian.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes are reinterpreted as words below; a big-endian host would write files that nobody can read.
assert sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight as the solver chose it: W = (codes - zeros) * scales, group by group along K.

    codes: [N, K] int8, signed. scales: [N, G] in the dtype it is stored in. zeros: [N, G] int8, or None if symmetric.
    group_size: columns per scale (K when there is one scale a row).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.codes.dtype == torch.int8
        assert columns % self.group_size == 0
        assert self.scales.shape == (rows, columns // self.group_size)
        assert self.zeros is None or (self.zeros.dtype == torch.int8 and self.zeros.shape == self.scales.shape)

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same weight on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantizedWeight(self.codes.to(device), self.scales.to(device), zeros, self.group_size)


def pack_int4(codes: Tensor) -> Tensor:
    """Eight signed 4-bit codes to a word, along K.

    codes: [N, K] int8 in -8..7. Returns [N, ceil(K / 8)] int32.
    """
    assert codes.dtype == torch.int8 and codes.dim() == 2
    unsigned = _pad_columns(codes.view(torch.uint8).bitwise_and(0xF).bitwise_xor_(0x8), 8)
    pairs = unsigned[:, 1::2].bitwise_left_shift(4)
    pairs |= unsigned[:, 0::2]
    return _as_words(pairs)


def unpack_int4(words: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int4`.

    words: [N, ceil(in_features / 8)] int32. Returns [N, in_features] int8 in -8..7.
    """
    pairs = _as_bytes(words, in_features, 8)
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.int8, device=words.device)
    unsigned = codes.view(torch.uint8)
    unsigned[:, 0::2] = pairs & 0xF
    unsigned[:, 1::2] = pairs >> 4
    codes -= 8
    return codes[:, :in_features].contiguous()


def pack_int8(codes: Tensor) -> Tensor:
    """Four signed 8-bit codes to a word, along K.

    codes: [N, K] int8. Returns [N, ceil(K / 4)] int32.
    """
    assert codes.dtype == torch.int8 and codes.dim() == 2
    return _as_words(_pad_columns(codes.view(torch.uint8).bitwise_xor(0x80), 4))


def unpack_int8(words: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_int8`.

    words: [N, ceil(in_features / 4)] int32. Returns [N, in_features] int8.
    """
    flipped = _as_bytes(words, in_features, 4) ^ 0x80
    return flipped.view(torch.int8)[:, :in_features].contiguous()


def pack_zeros(zeros: Tensor) -> Tensor:
    """Eight 4-bit zero points to a word, along N (not along K, as codes are).

    zeros: [N, G] int8 in -8..7. Returns [ceil(N / 8), G] int32.
    """
    return pack_int4(zeros.t().contiguous()).t().contiguous()


def unpack_zeros(words: Tensor, out_features: int) -> Tensor:
    """The inverse of `pack_zeros`.

    words: [ceil(out_features / 8), G] int32. Returns [out_features, G] int8 in -8..7.
    """
    return unpack_int4(words.t().contiguous(), out_features).t().contiguous()


def pack_zeros8(zeros: Tensor) -> Tensor:
    """Four 8-bit zero points to a word, along N. zeros: [N, G] int8. Returns [ceil(N / 4), G] int32."""
    return pack_int8(zeros.t().contiguous()).t().contiguous()


def unpack_zeros8(words: Tensor, out_features: int) -> Tensor:
    """The inverse of `pack_zeros8`. words: [ceil(out_features / 4), G] int32. Returns [out_features, G] int8."""
    return unpack_int8(words.t().contiguous(), out_features).t().contiguous()


def _pad_columns(unsigned: Tensor, per_word: int) -> Tensor:
    """`unsigned` [N, K] with zero columns up to a whole number of words."""
    missing = -unsigned.shape[1] % per_word
    return torch.nn.functional.pad(unsigned, (0, missing)) if missing else unsigned


def _as_words(unsigned: Tensor) -> Tensor:
    """`unsigned` [N, 4 W] bytes as [N, W] int32.

    Through one dimension: a tensor of one row may have any stride, and `view` to a wider type asks for a fit one.
    """
    return unsigned.reshape(-1).view(torch.int32).view(unsigned.shape[0], unsigned.shape[1] // 4)


def _as_bytes(words: Tensor, elements: int, per_word: int) -> Tensor:
    """`words` [N, W] int32 as [N, 4 W] bytes, once their number fits `elements` a row."""
    assert words.dtype == torch.int32 and words.dim() == 2
    assert words.shape[1] == -(-elements // per_word)
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], words.shape[1] * 4)
