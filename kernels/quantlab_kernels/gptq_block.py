"""The inner loop of the GPTQ solve: a block of columns rounded one after the other, each error passed on at once.

A program takes a few rows of the weight, which are independent, and holds what is left of all the block's columns for
them in registers. Step i rounds column i and adds its error, times a column of the factor, to the columns in front of
it, in the order and with the roundings of the loop over columns in torch. Knows nothing about Hessians.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import require, require_gpu

MOST_COLUMNS = 128
# Rows of the weight a program takes, with one warp: enough programs to fill a GPU at a thousand rows.
WIDTH, WARPS = 8, 1


@triton.jit
def _load_column(wt, st, zt, at, ok, ZEROS: tl.constexpr):
    """Weights, steps of the grid and zero points of one column."""
    w, step = tl.load(wt + at, ok, 0.0), tl.load(st + at, ok, 1.0)
    zero = tl.load(zt + at, ok, 0.0) if ZEROS else tl.zeros_like(w)
    return w, step, zero


@triton.jit(do_not_specialize=["rows", "columns"])
def _gptq_block_kernel(
    wt, target, st, zt, inner, codes, errors, rows, columns, code_min, code_max,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    # Matrices are [columns of the weight, rows of the weight], as the solver keeps them.
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    ok = n < rows
    column = tl.arange(0, SIZE)
    at = column.to(tl.int64)[:, None] * rows + n[None, :]
    left = tl.load(target + at, (column < columns)[:, None] & ok[None, :], 0.0)
    here = (columns - 1).to(tl.int64) * rows + n
    w, step, zero = _load_column(wt, st, zt, here, ok, ZEROS)
    i = columns - 1
    share = tl.load(inner + i * columns + column, column < i, 0.0)
    while i >= 0:
        # The column after this one, on its way meanwhile.
        after = tl.maximum(i - 1, 0)
        there = after.to(tl.int64) * rows + n
        next_w, next_step, next_zero = _load_column(wt, st, zt, there, ok, ZEROS)
        next_share = tl.load(inner + after * columns + column, column < after, 0.0)
        wanted = tl.sum(tl.where((column == i)[:, None], left, 0.0), 0)
        # The bounds are whole numbers, so that the order of clamping and rounding is free. 1.5 * 2^23: what is left of
        # the fraction is rounded, halves to even.
        code = tl.minimum(tl.maximum(tl.div_rn(wanted, step) + zero, code_min), code_max)
        code = (code + 12582912.0) - 12582912.0
        error = w - (code - zero) * step
        tl.store(codes + here, code, ok)
        tl.store(errors + here, error, ok)
        left += share[:, None] * error[None, :]
        w, step, zero, share, here = next_w, next_step, next_zero, next_share, there
        i -= 1


def gptq_block(
    wt: Tensor,
    target: Tensor,
    grid: tuple[Tensor, Tensor | None],
    inner: Tensor,
    out: tuple[Tensor, Tensor],
    bounds: tuple[int, int],
) -> None:
    """Round the columns of a block, the last first; fills the codes and errors of `out`.

    wt: [C, N] fp32, C <= 128 columns of the weight as rows; target: the same plus what finished columns ask for; grid:
    steps and zero points, [C, N] fp32; inner: [C, C] fp32, inner[i, j] what column i takes of the error of column j;
    out: codes and errors, [C, N] fp32; bounds: the least and the largest code. Raises ValueError.
    """
    (st, zt), (codes, errors) = grid, out
    columns, rows = wt.shape
    require(0 < columns <= MOST_COLUMNS, f"a block holds 1 to {MOST_COLUMNS} columns, not {columns}")
    for name, x in (("target", target), ("steps", st), ("zero points", zt), ("codes", codes), ("errors", errors)):
        require(x is None or (x.shape == wt.shape and x.is_contiguous()), f"{name} must be contiguous [C, N], as wt is")
    require(wt.is_contiguous() and inner.shape == (columns, columns), "wt must be contiguous, inner [C, C]")
    for x in (wt, target, st, zt, inner, codes, errors):
        fits = x is None or (x.dtype == torch.float32 and x.device == wt.device)
        require(fits, "all tensors must be fp32 and on one device")
    require_gpu("wt", wt, "ref_gptq")
    if rows:
        _gptq_block_kernel[(triton.cdiv(rows, WIDTH),)](
            wt, target, st, wt if zt is None else zt, inner.t().contiguous(), codes, errors, rows, columns,
            float(bounds[0]), float(bounds[1]), SIZE=triton.next_power_of_2(columns), WIDTH=WIDTH,
            ZEROS=zt is not None, num_warps=WARPS,
        )  # fmt: skip
