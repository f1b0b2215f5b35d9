"""Random 4-bit linears for the tests of the W4A16 kernels, and how wrong a kernel may be."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize

# Relative RMSE against float64 on the same codes, about three times what was measured on an H200 (2026-11-22): 2.3e-4
# in float16, 1.8e-3 in bfloat16, of which nearly all is the output's own rounding. The interpreter truncates bfloat16.
TOLERANCE = {torch.float16: 7e-4, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Linear:
    """A random weight of a shape, group size and kind, x [M, K] and bias for it, and the product in float64."""

    rows: int
    columns: int
    group: int
    tokens: int
    zeros: bool = False
    bias: bool = False
    dtype: torch.dtype = torch.float16
    bits: int = 4

    def draw(self, device: str) -> tuple[QuantizedWeight, Tensor, Tensor | None, Tensor]:
        groups = (self.rows, self.columns // self.group)
        half = 1 << (self.bits - 1)
        codes = torch.randint(-half, half, (self.rows, self.columns), dtype=torch.int8, device=device)
        scales = ((torch.rand(groups, device=device) + 0.5) * 8 / half / self.columns**0.5).to(self.dtype)
        scales[torch.rand(groups, device=device) < 0.3] *= -1  # the solver writes such scales, too
        zeros = torch.randint(-half, half, groups, dtype=torch.int8, device=device) if self.zeros else None
        q = QuantizedWeight(codes, scales, zeros, self.group)
        x = torch.randn(self.tokens, self.columns, device=device).to(self.dtype)
        bias = torch.randn(self.rows, device=device).to(self.dtype) if self.bias else None
        exact = x.double() @ dequantize(q).double().t()
        return q, x, bias, exact if bias is None else exact + bias.double()
