"""Linears through quantlab_kernels: INT4 and INT8 as stored, 16-bit through cuBLAS and, for one token, our kernel.

Knows nothing about files or models.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantlab.runtime.linears import Activations, DenseLinear, Int8Rows, Linear, RawLinear, SideBySide, bytes_of
from quantlab.schemes import describe
from quantlab_kernels import w8a8
from quantlab_kernels.dense_gemv import dense_gemv
from quantlab_kernels.int8_head import int8_head
from quantlab_kernels.w4a16 import w4a16_linear
from quantlab_kernels.w4a16_layout import W4A16Weight, to_kernel
from quantlab_kernels.w8a8_layout import W8A8Weight, to_w8a8
from quantlab_kernels.warm_up import warm_up, warm_up_w8a8


class DenseCudaLinear(DenseLinear):
    """A dense layer with a kernel of its own for one token."""

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        if x.shape[0] == 1:
            return dense_gemv(x.contiguous(), self.weight, self.bias)
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class WeightOnlyLinear:
    """4- or 8-bit codes in kernel order times 16-bit activations."""

    takes_int8: ClassVar[bool] = False
    weight: W4A16Weight
    bias: Tensor | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return self.weight.nbytes + bytes_of(self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        return w4a16_linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Int8CudaLinear:
    """INT8 codes times activations in INT8 with a scale a token; `dtype` is that of the result."""

    takes_int8: ClassVar[bool] = True
    weight: W8A8Weight
    bias: Tensor | None
    dtype: torch.dtype
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return self.weight.nbytes + bytes_of(self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K], quantized by whoever made it or here -> [T, N]."""
        if not isinstance(x, Int8Rows):
            return w8a8.w8a8_linear(x, self.weight, self.bias)
        return w8a8.w8a8_gemm(x.codes, x.scales, self.weight, self.bias, self.dtype)


def make_linear(raw: RawLinear, dtype: torch.dtype) -> Linear:
    """The layer that runs `raw` on this GPU with activations in `dtype`."""
    if isinstance(raw.weight, Tensor):
        return DenseCudaLinear(raw.weight.contiguous(), raw.bias, f"cuBLAS {name_of(dtype)}, our GEMV for one token")
    assert raw.scheme is not None
    what = describe(raw.scheme)
    if raw.scheme.quantizes_activations:
        return Int8CudaLinear(to_w8a8(raw.weight), raw.bias, dtype, f"quantlab int8 x int8 ({what})")
    weight = to_kernel(raw.weight, dtype, raw.scheme.bits)
    return WeightOnlyLinear(weight, raw.bias, f"quantlab int{raw.scheme.bits} x {name_of(dtype)} ({what})")


def make_int8_head(weight: Tensor) -> Linear:
    """A 16-bit lm_head [V, K] in INT8, which the kernel's name says, with what that costs."""
    packed, error = int8_head(weight)
    return WeightOnlyLinear(
        packed, None, f"quantlab int8 x {name_of(weight.dtype)} (made while loading, {error:.2%} off)"
    )


def warm_linears(layers: Iterable[Linear], tokens: Iterable[int]) -> int:
    """Compile what the layers launch for these numbers of tokens; returns how many kernels."""
    parts = [part for layer in layers for part in (layer.parts if isinstance(layer, SideBySide) else (layer,))]
    counts = list(tokens)
    only = [(part.weight, part.bias) for part in parts if isinstance(part, WeightOnlyLinear)]
    int8 = [(part.weight, part.bias) for part in parts if isinstance(part, Int8CudaLinear)]
    workers = min(16, os.cpu_count() or 1)
    compiled = warm_up(only, counts, workers)
    if int8:
        dtype = next(part.dtype for part in parts if isinstance(part, Int8CudaLinear))
        compiled += warm_up_w8a8(int8, counts, dtype, workers)
    return compiled


def name_of(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or torch's own name."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))
