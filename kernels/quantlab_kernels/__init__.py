"""Quantized operations by name; knows nothing about files, models or command lines."""

from quantlab_kernels.layout import (
    QuantizedWeight,
    pack_int4,
    pack_int8,
    pack_zeros,
    unpack_int4,
    unpack_int8,
    unpack_zeros,
)
from quantlab_kernels.ref import dequantize, int8_matmul, quantize_per_token, w8a8_linear

__all__ = [
    "QuantizedWeight",
    "dequantize",
    "int8_matmul",
    "pack_int4",
    "pack_int8",
    "pack_zeros",
    "quantize_per_token",
    "unpack_int4",
    "unpack_int8",
    "unpack_zeros",
    "w8a8_linear",
]
