"""The GPTQ solve: codes for a weight matrix that least disturb its output, given the Hessian of its input.

Pure functions on tensors: knows nothing about models, files or where the Hessian came from.

Minimises tr(E H E^T), E = W - W_hat, one column at a time, the last first. With H = L L^T and L lower triangular,
column i of E L is L_ii (E_i + sum_{j>i} E_j L_ji / L_ii), so rounding W_i plus that feedback is the greedy minimum.
This is LDLQ (QuIP, arXiv 2307.13304, section 3 and theorem 6), which equals GPTQ (arXiv 2210.17323) but needs one
Cholesky factor in place of a Cholesky, an inverse and a second Cholesky: a third of the work and half of the memory.
"""

from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from quantlab.errors import SolveError
from quantlab.quant.grid import levels, spread_groups
from quantlab.schemes import Scheme

MAX_RETRIES = 12
# Columns between two matrix products: few enough that what they share stays in the cache.
BLOCK = 32
# On a GPU, whatever is asked: the most that the kernel takes. It costs a quarter of blocks of 32.
GPU_BLOCK = 128
# Lengths of products are rounded up to this many columns: the CPU library compiles and keeps code for every shape it
# meets, which came to half a gigabyte where each block had a length of its own.
FEW_SHAPES = 512


@dataclass(frozen=True, slots=True)
class Factor:
    """`lower: [K, K]` fp32, lower triangular, L L^T = H[order][:, order] + damping * mean(diag H) * I.

    `order` holds the columns from the one that is rounded last to the one that is rounded first.
    """

    lower: Tensor
    order: Tensor
    damping: float
    retries: int


def factorize(h: Tensor, damping: float, activation_order: bool) -> Factor:
    """The factor of `h: [K, K]` fp32, its columns in the order in which they will be rounded, last first.

    With `activation_order` the columns with the largest diagonal are rounded first; group membership stays that of the
    original columns. Damping doubles until the factorization succeeds; raises SolveError after MAX_RETRIES.
    """
    diagonal = h.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else torch.arange(len(h))
    order = order.to(h.device).flip(0)
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    info = torch.empty((), dtype=torch.int32, device=h.device)
    for retry in range(MAX_RETRIES):
        m = h[order[:, None], order]
        m.diagonal().add_(damping * mean)
        lower = m.t()  # symmetric, and in LAPACK's layout: factorized where it lies
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return Factor(lower, order, damping, retry)
        damping *= 2
    fix = "a larger damping in the recipe, or ignore the module"
    raise SolveError(f"the Hessian could not be factorized with damping up to {damping / 2:.3g}", fix=fix)


def solve(
    w: Tensor, factor: Factor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, block_size: int = BLOCK
) -> Tensor:
    """Signed codes int8 `[N, K]` of `w: [N, K]` fp32 on the fixed grid `scales, zeros: [N, G]`.

    Works on transposed rows so that each column of W is contiguous, in blocks of `block_size` columns: the feedback of
    finished blocks comes from one matrix product, that inside a block column by column.
    """
    order, upper = factor.order, factor.lower.t()  # row i of `upper`: what column i hears from those after it
    wt = w.t()[order]
    st = spread_groups(scales, w.shape[1]).t()[order]
    zt = None if zeros is None else spread_groups(zeros, w.shape[1]).t()[order]
    errors, codes = torch.zeros_like(wt), torch.empty_like(wt)
    inside = solve_block
    if w.is_cuda:
        inside, block_size = _solve_block_at_once, GPU_BLOCK
    for stop in range(len(wt), 0, -block_size):
        span = slice(max(0, stop - block_size), stop)
        feedback = upper[span] / upper.diagonal()[span, None]
        heard = slice(stop // FEW_SHAPES * FEW_SHAPES, None)  # from `stop` on; errors in front of it are still zero
        target = torch.addmm(wt[span], feedback[:, heard], errors[heard])
        grid = (st[span], None if zt is None else zt[span])
        inside(wt[span], target, grid, feedback[:, span], (codes[span], errors[span]), scheme)
    out = torch.empty(codes.shape, dtype=torch.int8, device=w.device)
    out[order] = codes.to(torch.int8)
    return out.t().contiguous()


def solve_block(
    wt: Tensor,
    target: Tensor,
    grid: tuple[Tensor, Tensor | None],
    inner: Tensor,
    out: tuple[Tensor, Tensor],
    scheme: Scheme,
) -> None:
    """Round a block's columns (here rows), last first; fills the codes and errors of `out`, and spoils `target`.

    wt, target: [C, N] fp32; grid: scales and zero points [C, N]; inner: [C, C], what row i takes of the error of row j.
    """
    (st, zt), (codes, errors) = grid, out
    # Each error goes at once to all columns that are left: what a column costs is the number of calls, and this one
    # is a fifth of a matrix-vector product's.
    for i in range(len(wt) - 1, -1, -1):
        q = torch.div(target[i], st[i], out=codes[i])
        if zt is not None:
            q += zt[i]
        q.round_().clamp_(scheme.code_min, scheme.code_max)
        torch.addcmul(wt[i], q if zt is None else q - zt[i], st[i], value=-1.0, out=errors[i])
        target[:i].addcmul_(inner[:i, i : i + 1], errors[i])


def _solve_block_at_once(
    wt: Tensor,
    target: Tensor,
    grid: tuple[Tensor, Tensor | None],
    inner: Tensor,
    out: tuple[Tensor, Tensor],
    scheme: Scheme,
) -> None:
    """`solve_block` as one kernel, since a GPU waits most of the time when every column takes six launches."""
    kernels = import_module("quantlab_kernels.gptq_block")  # imports Triton, which machines without a GPU may lack
    kernels.gptq_block(wt, target, grid, inner, out, (scheme.code_min, scheme.code_max))


def corrected_target(w: Tensor, residual: Tensor, factor: Factor, strength: float) -> Tensor:
    """The weights that best map the quantized model's inputs to the 16-bit model's outputs, part of the way.

    w: [N, K] fp32; residual: [K, N] fp32, the mean of x (y - W x)^T with x the quantized model's input and y the output
    wanted. Least squares: W + (H^-1 residual)^T (the idea of GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629).
    """
    y = torch.linalg.solve_triangular(factor.lower, residual[factor.order], upper=False)
    step = torch.empty_like(y)
    step[factor.order] = torch.linalg.solve_triangular(factor.lower.t(), y, upper=True)
    return w + strength * step.t()


def output_error(e: Tensor, h: Tensor) -> Tensor:
    """tr(E H E^T) by row: `e: [N, K]`, `h: [K, K]`, fp32 -> `[N]`; the summed squared output error of each channel."""
    return ((e @ h) * e).sum(1)


def descend(
    w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """One round of coordinate descent on tr(E H E^T): each code given the rest, each scale given its codes.

    w: [N, K] fp32; h: [K, K] fp32, damped; codes: [N, K] int8; scales: [N, G] stored dtype; returns new codes, scales.
    A code moves to round(W_hat_i + (E H)_i / H_ii); a scale to its least-squares value rounded to the stored dtype,
    kept only in rows where the objective falls.
    """
    columns = w.shape[1]
    width = columns // scales.shape[1]
    block = min(width, BLOCK)
    zt = None if zeros is None else zeros.t().float()
    st = scales.t().clone()
    lt = levels(codes, zeros).t().contiguous()
    et = w.t().contiguous() - lt * spread_groups(scales, columns).t().contiguous()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        group = start // width
        grid = (st[group].float(), None if zt is None else zt[group])
        _descend_block((start, stop), (lt, et), grid, h, scheme)
        if stop % width == 0:
            _refit_scale(slice(stop - width, stop), (lt, et), st, group, h)
    if zt is not None:
        lt += zt.repeat_interleave(width, dim=0)
    return lt.t().to(torch.int8).contiguous(), st.t().contiguous()


def _descend_block(
    span: tuple[int, int], rows: tuple[Tensor, Tensor], grid: tuple[Tensor, Tensor | None], h: Tensor, scheme: Scheme
) -> None:
    """Move the codes of a few columns, in code units: what a column costs is the number of calls, so few are made."""
    (start, stop), (lt, et), (scale, zero) = span, rows, grid
    diagonal = h.diagonal()[start:stop, None]
    product = h[start:stop] @ et  # (E H) of this block's columns, before any of them changes
    old = lt[start:stop] if zero is None else lt[start:stop] + zero
    wanted = torch.addcdiv(old, product, diagonal * scale)
    inner = h[start:stop, start:stop] / diagonal
    changes = torch.empty_like(wanted)
    for j, (q, was, change) in enumerate(zip(wanted, old, changes, strict=True)):
        torch.sub(q.round_().clamp_(scheme.code_min, scheme.code_max), was, out=change)
        wanted[j + 1 :].addcmul_(inner[j + 1 :, j : j + 1], change, value=-1.0)
    lt[start:stop] += changes
    et[start:stop] -= changes.mul_(scale)


def _refit_scale(columns: slice, rows: tuple[Tensor, Tensor], st: Tensor, group: int, h: Tensor) -> None:
    lt, et = rows
    level, old = lt[columns], st[group]
    gradient = (level * (h[columns] @ et)).sum(0)  # -1/2 d objective / d scale
    curvature = (level * (h[columns, columns] @ level)).sum(0)
    new = (old.float() + gradient / curvature.clamp(min=1e-30)).to(old.dtype)
    step = new.float() - old.float()
    falls = (step * (step * curvature - 2 * gradient) < 0) & (new != 0) & torch.isfinite(new)
    step = torch.where(falls, step, torch.zeros_like(step))
    st[group] = torch.where(falls, new, old)
    et[columns] -= step * level
