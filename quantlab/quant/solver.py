"""Codes for one group of linears that share an input: scales, solve, descent, and the choice against plain rounding.

Works on tensors and the recipe's passes; knows nothing about blocks, streams or files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.quant.amounts import CHUNK_ELEMENTS
from quantlab.quant.gptq import Factor, corrected_target, descend, factorize, solve
from quantlab.quant.grid import absmax_params, decode, nearest_codes, searched_params
from quantlab.recipe import Gptq, Rtn
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import quantize_per_token

# Codes [N, K] int8, scales [N, G], zero points [N, G] or None.
Chosen = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Tokens that no solver saw: inputs `x: [T, K]` and wanted outputs `y: [T, N]`, fp32."""

    x: Tensor
    y: Tensor

    def rows(self, rows: slice) -> "HeldOut":
        """The same tokens for some of the outputs."""
        return HeldOut(self.x, self.y[:, rows])


@dataclass(frozen=True, slots=True)
class Problem:
    """A group's weights and what is known of its input.

    w: [N, K] fp32, all linears of the group stacked; hessian: [K, K] fp32 or None without calibration; residual:
    [K, N] fp32 (see gptq.corrected_target) or None; column_scales: [K] fp32, by which a fold has multiplied w and
    divided the inputs.
    """

    w: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    hessian: Tensor | None = None
    residual: Tensor | None = None
    column_scales: Tensor | None = None

    def folded(self, scales: Tensor) -> "Problem":
        """The same problem with columns multiplied and inputs divided by `scales: [K]`."""
        assert self.column_scales is None
        hessian = None if self.hessian is None else self.hessian / (scales[:, None] * scales)
        residual = None if self.residual is None else self.residual / scales[:, None]
        return replace(self, w=self.w * scales, hessian=hessian, residual=residual, column_scales=scales)

    def rows(self, rows: slice) -> "Problem":
        """The same problem for some of the outputs; the Hessian is shared."""
        return replace(self, w=self.w[rows], residual=None if self.residual is None else self.residual[:, rows])


@dataclass(frozen=True, slots=True)
class Solution:
    """Codes of the stacked rows, how they were found, and what they cost.

    errors, energies: [N], summed squares over held-out tokens of the output error and of the wanted output.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    method: str
    damping: float
    retries: int
    errors: Tensor
    energies: Tensor

    def relative_error(self, rows: slice) -> float:
        """Squared error over squared output, for the linear in `rows`."""
        return float(self.errors[rows].sum() / self.energies[rows].sum().clamp(min=1e-30))

    def weight(self, rows: slice, group_size: int) -> QuantizedWeight:
        """The codes of the linear in `rows`."""
        zeros = None if self.zeros is None else self.zeros[rows].contiguous()
        return QuantizedWeight(self.codes[rows].contiguous(), self.scales[rows].contiguous(), zeros, group_size)


def solve_problem(problem: Problem, how: Gptq | Rtn, held_out: HeldOut | None) -> Solution:
    """The codes of `problem` by the pass `how`; raises SolveError if its Hessian cannot be factorized.

    The Hessian's diagonal is damped for the duration.
    """
    if isinstance(how, Rtn):
        return _in_rows(problem, held_out, f"rtn-{how.grid}", lambda part: _rounded(part, how.grid))
    assert problem.hessian is not None, "gptq needs calibration"
    diagonal = problem.hessian.diagonal()
    if not bool(diagonal.any()):  # an input that is always zero says nothing of what matters
        return _in_rows(problem, held_out, "rtn-mse", lambda part: _rounded(part, "mse"))
    factor = factorize(problem.hessian, how.damping, how.activation_order)
    importance = diagonal.clone()
    diagonal += factor.damping * importance.mean()
    found = _in_rows(problem, held_out, _label(how), lambda part: _solved(part, how, factor, importance))
    diagonal.copy_(importance)
    return replace(found, damping=factor.damping, retries=factor.retries)


def _solved(problem: Problem, how: Gptq, factor: Factor, importance: Tensor) -> Chosen:
    """The codes of a problem whose Hessian's diagonal is damped; `importance: [K]` is the diagonal before."""
    w, scheme = problem.w, problem.scheme
    if problem.residual is not None and how.target_correction > 0:
        w = corrected_target(w, problem.residual, factor, how.target_correction)
    scales, zeros = _params(replace(problem, w=w), how.grid, importance)
    codes = solve(w, factor, scales, zeros, scheme, how.block_size)
    assert problem.hessian is not None
    for _ in range(how.descent_rounds):
        codes, scales = descend(w, problem.hessian, codes, scales, zeros, scheme)
    return codes, scales, zeros


def plain_rounding(problem: Problem, held_out: HeldOut | None) -> Solution:
    """Round to nearest at absmax: what every other solution has to beat."""
    return _in_rows(problem, held_out, "rtn", lambda part: _rounded(part, "absmax"))


def _in_rows(problem: Problem, held_out: HeldOut | None, method: str, choose: Callable[[Problem], Chosen]) -> Solution:
    """Choose and measure a few rows at a time: rows are independent, and what is made on the way is several times W."""
    count, columns = problem.w.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    chosen, costs = [], []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        part = problem.rows(rows)
        chosen.append(choose(part))
        costs.append(_costs(part, None if held_out is None else held_out.rows(rows), chosen[-1]))
    codes, scales = (torch.cat([found[i] for found in chosen]) for i in (0, 1))  # type: ignore[misc]
    zeros = None if chosen[0][2] is None else torch.cat([found[2] for found in chosen])  # type: ignore[misc]
    errors, energies = (torch.cat([cost[i] for cost in costs]) for i in (0, 1))
    return Solution(codes, scales, zeros, method, 0.0, 0, errors, energies)


def better_rows(solution: Solution, plain: Solution, modules: list[slice]) -> tuple[Solution, list[bool]]:
    """`solution` with the rows of each linear in `modules` taken from `plain` where that errs less; True where kept."""
    kept = [solution.relative_error(rows) <= plain.relative_error(rows) for rows in modules]
    if all(kept):
        return solution, kept
    parts = [(solution if keep else plain, rows) for keep, rows in zip(kept, modules, strict=True)]
    codes = torch.cat([source.codes[rows] for source, rows in parts])
    scales = torch.cat([source.scales[rows] for source, rows in parts])
    errors = torch.cat([source.errors[rows] for source, rows in parts])
    zeros = None if solution.zeros is None else torch.cat([s.zeros[rows] for s, rows in parts])  # type: ignore[index]
    return replace(solution, codes=codes, scales=scales, zeros=zeros, errors=errors), kept


def _params(problem: Problem, grid: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    if grid == "absmax":
        return absmax_params(problem.w, problem.scheme, problem.scale_dtype)
    if grid == "hessian" and importance is None:
        assert problem.hessian is not None, "the hessian grid needs calibration"
        importance = problem.hessian.diagonal()
    return searched_params(problem.w, importance if grid == "hessian" else None, problem.scheme, problem.scale_dtype)


def _rounded(problem: Problem, grid: str) -> Chosen:
    scales, zeros = _params(problem, grid)
    return nearest_codes(problem.w, scales, zeros, problem.scheme), scales, zeros


def _costs(problem: Problem, held_out: HeldOut | None, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Summed squares of each row's output error and of its wanted output, `[N]` each."""
    rounded = decode(*chosen)
    if held_out is None:
        return (rounded - problem.w).square().sum(1), problem.w.square().sum(1)
    x = held_out.x if problem.column_scales is None else held_out.x / problem.column_scales
    if problem.scheme.quantizes_activations:
        token_codes, token_scales = quantize_per_token(x)
        x = token_codes.float() * token_scales
    return (x @ rounded.t() - held_out.y).square().sum(0), held_out.y.square().sum(0)


def _label(how: Gptq) -> str:
    parts = ["gptq", how.grid]
    if how.target_correction:
        parts.append(f"corrected {how.target_correction:g}")
    if how.descent_rounds:
        parts.append(f"descent {how.descent_rounds}")
    return " ".join(parts)
