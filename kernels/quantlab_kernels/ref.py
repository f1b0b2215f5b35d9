"""What every quantized operation means, in plain torch: the text that faster kernels are compared with.

Runs on any device. It knows nothing about files or models, and is written for clarity before speed.
"""

import torch
from torch import Tensor

from quantlab_kernels.layout import QuantizedWeight

# |int8 x int8| <= 2^14, so 1024 products sum to at most 2^24: every partial sum is exact in float32 (and in TF32,
# whose inputs keep 11 significant bits), in whatever order the GEMM adds them.
EXACT_COLUMNS = 1024


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight that `q` stands for, (code - zero) * scale, evaluated in the scale's dtype as readers of the file do.

    Returns [N, K] in q.scales.dtype.
    """
    rows, groups = q.scales.shape
    weight = q.codes.to(q.scales.dtype).view(rows, groups, q.group_size)
    if q.zeros is not None:
        weight -= q.zeros.to(q.scales.dtype).unsqueeze(-1)
    weight *= q.scales.unsqueeze(-1)
    return weight.view(rows, groups * q.group_size)


def w4a16_linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A linear layer on 16-bit activations and 4-bit weights, summed in float32.

    x: [..., K], bias: [N] or None. Returns [..., N] in x.dtype.
    """
    y = x.float() @ dequantize(q).float().t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `x` to symmetric INT8: scale = absmax / 127.5, code = round(x / scale) within -128..127.

    x: [..., K] floating. Returns codes [..., K] int8 and scales [..., 1] float32. Works in float32 whatever x is:
    a bfloat16 quotient near 127 has steps of 0.5 and would move codes. 127.5 is compressed-tensors' half range
    (`calculate_qparams`); a row of zeros gets the smallest step and codes 0.
    """
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True) / 127.5
    scales = scales.masked_fill(scales == 0, torch.finfo(torch.float32).eps)  # no scalar is copied from the host
    codes = (x / scales).clamp_(-128, 127).round_().to(torch.int8)
    return codes, scales


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact integer product a @ b.T.

    a: [M, K] int8, b: [N, K] int8. Returns [M, N] int32. Done as float32 GEMMs over column blocks short enough to be
    exact, since integer GEMMs are missing or slow on many devices.
    """
    assert a.dtype == b.dtype == torch.int8
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(EXACT_COLUMNS, dim=1), b.split(EXACT_COLUMNS, dim=1), strict=True):
        total += (left.float() @ right.float().t()).to(torch.int32)
    return total


def w8a8_linear(x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A linear layer on INT8 activations (quantized here, per token) and INT8 weights (one scale a row).

    x: [..., K], bias: [N] or None. Returns [..., N] in x.dtype; integer sums are exact, scales are applied in float32.
    """
    assert q.zeros is None and q.scales.shape[1] == 1
    codes, token_scales = quantize_per_token(x.reshape(-1, x.shape[-1]))
    y = int8_matmul(codes, q.codes).float()
    y *= token_scales
    y *= q.scales.float().t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], -1)
