"""Codes for one group of linears that share an input: scales, solve, descent, and the choice against plain rounding.

Works on tensors and the recipe's passes; knows nothing about blocks, streams or files.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.quant.gptq import corrected_target, descend, factorize, solve
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
    """The codes of `problem` by the pass `how`; raises SolveError if its Hessian cannot be factorized."""
    if isinstance(how, Rtn):
        return _measured(problem, held_out, _rounded(problem, how.grid), f"rtn-{how.grid}")
    assert problem.hessian is not None, "gptq needs calibration"
    if not bool(problem.hessian.diagonal().any()):  # an input that is always zero says nothing of what matters
        return _measured(problem, held_out, _rounded(problem, "mse"), "rtn-mse")
    factor = factorize(problem.hessian, how.damping, how.activation_order)
    w, scheme = problem.w, problem.scheme
    if problem.residual is not None and how.target_correction > 0:
        w = corrected_target(w, problem.residual, factor, how.target_correction)
    scales, zeros = _params(replace(problem, w=w), how.grid)
    codes = solve(w, factor, scales, zeros, scheme, how.block_size)
    if how.descent_rounds:
        damped = problem.hessian.clone()
        damped.diagonal().add_(factor.damping * damped.diagonal().mean())
        for _ in range(how.descent_rounds):
            codes, scales = descend(w, damped, codes, scales, zeros, scheme)
    return _measured(problem, held_out, (codes, scales, zeros), _label(how), factor.damping, factor.retries)


def plain_rounding(problem: Problem, held_out: HeldOut | None) -> Solution:
    """Round to nearest at absmax: what every other solution has to beat."""
    return _measured(problem, held_out, _rounded(problem, "absmax"), "rtn")


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


def _params(problem: Problem, grid: str) -> tuple[Tensor, Tensor | None]:
    if grid == "absmax":
        return absmax_params(problem.w, problem.scheme, problem.scale_dtype)
    importance = None
    if grid == "hessian":
        assert problem.hessian is not None, "the hessian grid needs calibration"
        importance = problem.hessian.diagonal()
    return searched_params(problem.w, importance, problem.scheme, problem.scale_dtype)


def _rounded(problem: Problem, grid: str) -> Chosen:
    scales, zeros = _params(problem, grid)
    return nearest_codes(problem.w, scales, zeros, problem.scheme), scales, zeros


def _measured(
    problem: Problem, held_out: HeldOut | None, chosen: Chosen, method: str, damping: float = 0.0, retries: int = 0
) -> Solution:
    codes, scales, zeros = chosen
    rounded = decode(codes, scales, zeros)
    if held_out is None:
        errors, energies = (rounded - problem.w).square().sum(1), problem.w.square().sum(1)
    else:
        x = held_out.x if problem.column_scales is None else held_out.x / problem.column_scales
        if problem.scheme.quantizes_activations:
            token_codes, token_scales = quantize_per_token(x)
            x = token_codes.float() * token_scales
        errors, energies = (x @ rounded.t() - held_out.y).square().sum(0), held_out.y.square().sum(0)
    return Solution(codes, scales, zeros, method, damping, retries, errors, energies)


def _label(how: Gptq) -> str:
    parts = ["gptq", how.grid]
    if how.target_correction:
        parts.append(f"corrected {how.target_correction:g}")
    if how.descent_rounds:
        parts.append(f"descent {how.descent_rounds}")
    return " ".join(parts)
