"""What lies between the linears of a layer, one launch each: norms with the residual, SiLU times gate, embeddings.

Every value is rounded where a model in 16 bits rounds it, so results are those of the modules that these replace
(`ref_fused` says them in plain torch); the quantized forms are `ref.quantize_per_token` of the same values. All work
in fp32 in between. Sums go in a fixed order: the same input gives the same bits.

A kernel lets the one behind it start at once and itself reads nothing but weights until the one before it has ended
(programmatic dependent launch), so the next linear fetches its first weights meanwhile. Knows nothing about models.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import has_pdl, has_ptx, require, require_gpu
from quantlab_kernels.rows import empty_rows

DTYPES = (torch.float16, torch.bfloat16)
# A row is one program's: the widest that its registers take.
MOST_COLUMNS = 32768
# Columns a program of the element-wise kernels takes: 16 bytes a thread of four warps.
COLUMNS = 1024
_SILU = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 t, t; mul.f32 $0, $1, t; }"  # 0fBFB8AA3B: -log2(e), 0f3F800000: 1
)


@triton.jit
def _begin(PDL: tl.constexpr):
    """Let the next kernel start, wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _quantize_row(y, codes, scales, row, column, inside, COLUMNS: tl.constexpr):
    """A row of y to int8 codes and their scale, as `ref.quantize_per_token` does."""
    largest = tl.max(tl.abs(y), 0)
    scale = tl.div_rn(largest, 127.5)
    scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)
    # y / scale to the last bit, as division does it: a quotient, and what is missing of it (Markstein 1990).
    inverse = tl.div_rn(1.0, scale)
    quotient = y * inverse
    y = tl.fma(tl.fma(-quotient, scale + tl.zeros_like(y), y), inverse + tl.zeros_like(y), quotient)
    y = tl.minimum(tl.maximum(y, -128.0), 127.0)
    # 1.5 * 2^23: what is left of the fraction is rounded, halves to even, and the code is the lowest byte.
    code = (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(codes + row * COLUMNS + column, code, inside)
    tl.store(scales + row, scale)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, rows, out, scales, summed, eps, x_stride, residual_stride,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, GATHER: tl.constexpr, INT8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    w = tl.load(weight + column, inside, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + row) if GATHER else row
    y = tl.load(x + source * x_stride + column, inside, 0.0)
    dtype = x.dtype.element_ty
    if RESIDUAL:
        more = tl.load(residual + source * residual_stride + column, inside, 0.0)
        y = (y.to(tl.float32) + more.to(tl.float32)).to(dtype)
    if RESIDUAL or GATHER:
        tl.store(summed + row * COLUMNS + column, y, inside)
    y = y.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(y * y, 0) / COLUMNS + eps)
    y = ((y * inverse).to(dtype).to(tl.float32) * w).to(dtype)
    if INT8:
        _quantize_row(y.to(tl.float32), out, scales, row, column, inside, COLUMNS)
    else:
        tl.store(out + row * COLUMNS + column, y, inside)


@triton.jit
def _silu(x, PTX: tl.constexpr):
    """x / (1 + exp(-x)), to a few units in the last place of fp32."""
    if PTX:
        # A plain division and exponential spend fourteen instructions on results that are no normal numbers.
        y = tl.inline_asm_elementwise(_SILU, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = x / (1.0 + tl.exp(-x))
    return y


@triton.jit
def _gated(gate_up, row, column, inside, COLUMNS: tl.constexpr, PTX: tl.constexpr):
    """silu(gate) * up of some columns, in fp32 after the roundings to 16 bits."""
    at = gate_up + row * (2 * COLUMNS) + column
    dtype = gate_up.dtype.element_ty
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + COLUMNS, inside, 0.0).to(tl.float32)
    y = _silu(gate, PTX).to(dtype).to(tl.float32) * up
    return y.to(dtype)


@triton.jit
def _silu_mul_kernel(gate_up, out, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr):
    _begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < COLUMNS
    tl.store(out + row * COLUMNS + column, _gated(gate_up, row, column, inside, COLUMNS, PTX), inside)


@triton.jit
def _silu_mul_int8_kernel(
    gate_up, codes, scales, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr
):
    _begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < COLUMNS
    y = _gated(gate_up, row, column, inside, COLUMNS, PTX).to(tl.float32)
    _quantize_row(y, codes, scales, row, column, inside, COLUMNS)


@triton.jit
def _embed_kernel(
    ids, sampled, table, out, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SAMPLED: tl.constexpr, PDL: tl.constexpr
):
    _begin(PDL)
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < COLUMNS
    row = tl.load(ids + token)
    if SAMPLED:
        row = tl.where(row < 0, tl.load(sampled + tl.maximum(-1 - row, 0)), row)
    tl.store(out + token * COLUMNS + column, tl.load(table + row * COLUMNS + column, inside, 0.0), inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of x plus the residual, and the sum, which is the next residual.

    x, residual: [M, H] fp16 or bf16, rows may have any stride; weight: [H], same dtype; rows: [R] int64, the only rows
    wanted, all unless given. Returns [M or R, H] twice; the second is x itself if nothing was added or picked. Raises
    ValueError.
    """
    count = _check_norm(x, weight, residual, rows)
    out = empty_rows(count, x.shape[1], x.dtype, x.device)
    return out, _launch_norm(x, weight, eps, (residual, rows), (out, None))


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm`, quantized per token: codes [M or R, H] int8, scales [M or R] fp32, and the sum."""
    count = _check_norm(x, weight, residual, rows)
    codes, scales = _empty_codes(count, x.shape[1], x)
    return codes, scales, _launch_norm(x, weight, eps, (residual, rows), (codes, scales))


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202). gate_up: [M, 2I] fp16 or bf16, gate first. Returns [M, I].

    Raises ValueError.
    """
    columns = _check_gate_up(gate_up)
    out = empty_rows(gate_up.shape[0], columns, gate_up.dtype, gate_up.device)
    if out.numel():
        pdl = has_pdl(gate_up)
        grid = (triton.cdiv(columns, COLUMNS), gate_up.shape[0])
        ptx = has_ptx(gate_up)
        _silu_mul_kernel[grid](gate_up, out, columns, COLUMNS, ptx, pdl, num_warps=4, launch_pdl=pdl)
    return out


def silu_mul_quantized(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_mul`, quantized per token: codes [M, I] int8 and scales [M] fp32. Raises ValueError."""
    columns = _check_gate_up(gate_up)
    require(columns <= MOST_COLUMNS, f"rows of {columns} are too wide to quantize; {MOST_COLUMNS} at most")
    codes, scales = _empty_codes(gate_up.shape[0], columns, gate_up)
    if codes.numel():
        width, ptx, pdl = triton.next_power_of_2(columns), has_ptx(gate_up), has_pdl(gate_up)
        grid = (gate_up.shape[0],)
        _silu_mul_int8_kernel[grid](
            gate_up, codes, scales, columns, width, ptx, pdl, num_warps=_warps(width), launch_pdl=pdl
        )  # fmt: skip
    return codes, scales


def embed(ids: Tensor, table: Tensor, sampled: Tensor | None = None) -> Tensor:
    """Rows of an embedding. ids: [T] int64; table: [V, H] fp16 or bf16; sampled: [slots] int64.

    An id below zero stands for sampled[-1 - id]: a token that an earlier step drew for a slot and that the host has not
    read yet. Ids are the caller's to keep below V. Returns [T, H]. Raises ValueError.
    """
    require(ids.dim() == 1 and ids.dtype == torch.int64 and ids.is_contiguous(), "ids must be contiguous [T] int64")
    require(table.dim() == 2 and table.dtype in DTYPES, f"the table must be [V, H] fp16 or bf16, not {table.dtype}")
    require(table.is_contiguous() and table.device == ids.device, "the table must be contiguous, on the ids' device")
    if sampled is not None:
        fits = sampled.dim() == 1 and sampled.dtype == torch.int64 and sampled.device == ids.device
        require(fits and sampled.is_contiguous(), "sampled must be contiguous [slots] int64 on the ids' device")
    require_gpu("ids", ids, "ref_fused")
    out = torch.empty(ids.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    if out.numel():
        pdl = has_pdl(ids)
        grid = (triton.cdiv(table.shape[1], COLUMNS), ids.shape[0])
        picks = ids if sampled is None else sampled
        _embed_kernel[grid](
            ids, picks, table, out, table.shape[1], COLUMNS, sampled is not None, pdl, num_warps=4, launch_pdl=pdl
        )  # fmt: skip
    return out


def _launch_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    more: tuple[Tensor | None, Tensor | None],
    out: tuple[Tensor, Tensor | None],
) -> Tensor:
    """more: residual and rows; out: normed values, or codes and scales. Returns the sum."""
    (residual, rows), (normed, scales) = more, out
    plain = residual is None and rows is None
    summed = x if plain else torch.empty(normed.shape, dtype=x.dtype, device=x.device)
    if normed.numel():
        width, pdl = triton.next_power_of_2(x.shape[1]), has_pdl(x)
        added = x if residual is None else residual
        _rms_norm_kernel[(normed.shape[0],)](
            x, added, weight, x if rows is None else rows, normed, normed if scales is None else scales, summed, eps,
            x.stride(0), added.stride(0), x.shape[1], width, residual is not None, rows is not None,
            scales is not None, pdl, num_warps=_warps(width), launch_pdl=pdl,
        )  # fmt: skip
    return summed


def _warps(width: int) -> int:
    """16 elements a thread, within 1 to 16 warps."""
    return max(1, min(16, width // 512))


def _empty_codes(rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    codes = empty_rows(rows, columns, torch.int8, like.device)
    return codes, torch.empty(rows, dtype=torch.float32, device=like.device)


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None, rows: Tensor | None) -> int:
    """Rows of the result."""
    for name, value in (("x", x), ("residual", residual)):
        if value is not None:
            require(value.dim() == 2 and value.shape == x.shape, f"{name} must be [M, H], as x is")
            require(value.dtype == x.dtype and value.dtype in DTYPES, f"{name} is {value.dtype}; fp16 or bf16, as x is")
            require(value.stride(1) == 1 and value.device == x.device, f"rows of {name} must be contiguous, beside x")
    columns = x.shape[1]
    require(0 < columns <= MOST_COLUMNS, f"rows of {columns} are not known; {MOST_COLUMNS} columns at most")
    fits = weight.shape == (columns,) and weight.dtype == x.dtype and weight.device == x.device
    require(fits and weight.is_contiguous(), f"weight must be contiguous [{columns}] {x.dtype} on {x.device}")
    require_gpu("x", x, "ref_fused")
    if rows is None:
        return x.shape[0]
    fits = rows.dim() == 1 and rows.dtype == torch.int64 and rows.device == x.device
    require(fits and rows.is_contiguous(), "rows must be contiguous [R] int64 on x's device")
    return rows.shape[0]


def _check_gate_up(gate_up: Tensor) -> int:
    """Columns of the result."""
    require(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up must be [M, 2I], not {list(gate_up.shape)}")
    require(gate_up.dtype in DTYPES, f"gate_up is {gate_up.dtype}; fp16 or bf16 is known")
    require(gate_up.is_contiguous(), "gate_up must be contiguous")
    require_gpu("gate_up", gate_up, "ref_fused")
    return gate_up.shape[1] // 2
