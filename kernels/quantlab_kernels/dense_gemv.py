"""y = x W^T (+ bias) for one token and a 16-bit weight: as fast as the weight can be read.

A program takes some rows of the weight and all of K; it fetches its first weights before the kernel ahead of it has
ended (programmatic dependent launch) and each step's before it multiplies those of the step before. Sums are fp32 in a
fixed order. Knows nothing about models.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import has_pdl, require, require_gpu

DTYPES = (torch.float16, torch.bfloat16)
# Rows and columns of a step, and warps: 64 bytes a thread, several programs a processor.
ROWS, COLUMNS, WARPS = 4, 1024, 4


@triton.jit
def _gemv_kernel(
    x, weight, bias, out, rows,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row_ok = row < rows
    at = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    # Past K: nothing is read, and zeros are added.
    w = tl.load(at, row_ok[:, None] & (column < K)[None, :], 0.0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.static_range(0, K, COLUMNS):
        now = w
        if start + COLUMNS < K:
            ahead = start + COLUMNS + column
            w = tl.load(
                at + (start + COLUMNS), row_ok[:, None] & (ahead < K)[None, :], 0.0, eviction_policy="evict_first"
            )
        values = tl.load(x + start + column, start + column < K, 0.0).to(tl.float32)
        total += now.to(tl.float32) * values[None, :]
    y = tl.sum(total, 1)
    if BIAS:
        y += tl.load(bias + row, row_ok, 0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), row_ok)


def dense_gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [1, K], weight: [N, K], bias: [N] or None, all fp16 or all bf16 and contiguous. Returns [1, N].

    Raises ValueError.
    """
    rows, columns = weight.shape
    require(x.shape == (1, columns), f"x must be [1, {columns}], not {list(x.shape)}")
    require(weight.dtype in DTYPES and x.dtype == weight.dtype, f"x is {x.dtype}, the weight {weight.dtype}")
    require(x.is_contiguous() and weight.is_contiguous(), "x and the weight must be contiguous")
    fits = bias is None or (bias.shape == (rows,) and bias.dtype == x.dtype and bias.is_contiguous())
    require(fits, f"bias must be contiguous [{rows}] {x.dtype}")
    require_gpu("x", x, "ref")
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    pdl = has_pdl(x)
    _gemv_kernel[(triton.cdiv(rows, ROWS),)](
        x, weight, weight if bias is None else bias, out, rows,
        columns, ROWS, COLUMNS, bias is not None, pdl, num_warps=WARPS, launch_pdl=pdl,
    )  # fmt: skip
    return out
