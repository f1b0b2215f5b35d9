"""Quantized linears through the packed products that torch has for CPUs.

INT4 weights stay packed, INT8 weights stay INT8, and only the layers that no product fits are widened, which their
`kernel` says. Activations are rounded to bf16 for the weight-only products: those of other dtypes are loops without
vector instructions (40 times slower). Knows nothing about files or models.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from quantlab.runtime.linears import Activations, DenseLinear, Linear, RawLinear, bytes_of
from quantlab.schemes import describe
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize, quantize_per_token

INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS = 16  # the packed product takes whole multiples of so many rows
# From so many tokens on, one pass that widens INT8 codes to bf16 costs less than the packed product's slower rate.
WIDEN_TOKENS = 144
# torch's products compile code for each number of rows that they meet and keep it, 0.8 GB over a minute of mixed steps;
# with rows rounded up to these multiples, (rows up to, multiple of), there are few.
ROW_STEPS = ((16, 1), (64, 8), (1 << 20, 32))


@dataclass(frozen=True, slots=True)
class EvenLinear(DenseLinear):
    """A dense layer whose products meet few different numbers of rows."""

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        return linear(even_rows(x), self.weight, self.bias)[: x.shape[0]]


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """words: torch's packed order of 4-bit codes; scales: [K / group, N, 2] bf16, scale and what is added after it."""

    takes_int8: ClassVar[bool] = False
    words: Tensor
    scales: Tensor
    group_size: int
    out_features: int
    bias: Tensor | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return bytes_of(self.words, self.scales, self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        wide = x.to(torch.bfloat16).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, self.words, self.group_size, self.scales)
        return _finish(y[:, : self.out_features], x, self.bias)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """codes: [N, K] int8 times bf16 activations; scales: [N] bf16."""

    takes_int8: ClassVar[bool] = False
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return bytes_of(self.codes, self.scales, self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        wide = x.to(torch.bfloat16).contiguous()
        if x.shape[0] < WIDEN_TOKENS:
            return _finish(torch.ops.aten._weight_int8pack_mm(wide, self.codes, self.scales), x, self.bias)
        y = linear(even_rows(wide), self.codes.to(torch.bfloat16))[: x.shape[0]]
        return _finish(y * self.scales, x, self.bias)


@dataclass(frozen=True, slots=True)
class W8A8Linear:
    """codes: [N, K] int8 times activations in INT8 with a scale a token, summed in int32; scales: [N] fp32."""

    takes_int8: ClassVar[bool] = False
    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return bytes_of(self.codes, self.scales, self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N], as quantlab_kernels.ref.w8a8_linear means it."""
        assert isinstance(x, Tensor)
        codes, scales = quantize_per_token(x)
        product = torch._int_mm(even_rows(codes), self.codes.t())[: x.shape[0]]
        y = product.float() * scales * self.scales
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def even_rows(x: Tensor) -> Tensor:
    """x: [T, K] with rows of zeros after it, up to the next of ROW_STEPS."""
    rows = x.shape[0]
    step = next(step for most, step in ROW_STEPS if rows <= most)
    missing = -rows % step
    return pad(x, (0, 0, 0, missing)) if missing else x


def make_linear(raw: RawLinear) -> Linear:
    """The layer that runs `raw` on this CPU."""
    if isinstance(raw.weight, Tensor):
        dtype = str(raw.weight.dtype).removeprefix("torch.")
        return EvenLinear(raw.weight, raw.bias, f"torch {dtype}")
    assert raw.scheme is not None
    what = describe(raw.scheme)
    if raw.scheme.quantizes_activations:
        return W8A8Linear(raw.weight.codes, raw.weight.scales.float().view(-1), raw.bias, f"torch int8 x int8 ({what})")
    if raw.scheme.bits == 4 and (group := int4_group(raw.weight)):
        return _int4(raw.weight, group, raw.bias, f"torch packed int4 x bf16 ({what})")
    if raw.scheme.bits == 8 and raw.scheme.symmetric and raw.scheme.group_size is None:
        scales = raw.weight.scales.to(torch.bfloat16).view(-1)
        return Int8Linear(raw.weight.codes, scales, raw.bias, f"torch int8 x bf16 ({what})")
    weight = dequantize(raw.weight)
    return EvenLinear(weight, raw.bias, f"no kernel for {what} on a CPU: widened to {weight.dtype} while loading")


def int4_group(weight: QuantizedWeight) -> int | None:
    """The group size that the packed product reads `weight` with, None if there is none."""
    columns = weight.codes.shape[1]
    if weight.group_size in INT4_GROUPS:
        return weight.group_size
    whole = weight.group_size == columns  # one scale a row: the same scale for each of smaller groups
    return next((size for size in reversed(INT4_GROUPS) if whole and columns % size == 0), None)


def _int4(weight: QuantizedWeight, group: int, bias: Tensor | None, kernel: str) -> Int4Linear:
    rows, columns = weight.codes.shape
    spread = weight.group_size // group
    scales = weight.scales.repeat_interleave(spread, dim=1)
    # The product multiplies code - 8, which is our signed code, and then adds: -zero * scale.
    zeros = torch.zeros_like(scales) if weight.zeros is None else weight.zeros.repeat_interleave(spread, dim=1)
    both = torch.stack((scales, -zeros.to(scales.dtype) * scales), dim=-1).to(torch.bfloat16)
    missing = -rows % INT4_ROWS
    both = pad(both, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()
    unsigned = pad(weight.codes.to(torch.int32) + 8, (0, 0, 0, missing), value=8)
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return Int4Linear(words, both, group, rows, bias, kernel)


def _finish(y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = y.to(x.dtype)
    return y if bias is None else y + bias
