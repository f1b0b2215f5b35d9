"""The one loop that quantizes a decoder block: group by group, each on the inputs that the groups before it produce.

Knows nothing about files, journals or which blocks come before and after; gives back codes and changed parameters.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import SolveError
from quantlab.events import ModuleDone, Notice
from quantlab.models.naming import INPUT_GROUPS, block_prefix
from quantlab.quant.amounts import HELD_OUT_TOKENS
from quantlab.quant.block_task import BlockTask, group_rows, install, weight_of
from quantlab.quant.device import release_freed_memory
from quantlab.quant.fold_search import FOLD_SOURCES, Fold, apply_fold, find_fold
from quantlab.quant.report import ModuleRow
from quantlab.quant.smoothquant import Inputs
from quantlab.quant.solver import HeldOut, Problem, Solution, better_rows, plain_rounding, solve_problem
from quantlab.quant.stages import Stream
from quantlab.quant.stats import Moments, add_product
from quantlab.recipe import Gptq
from quantlab.schemes import Scheme


@dataclass(slots=True)
class Streams:
    """The hidden states that enter a block: through quantized blocks, and through 16-bit ones where they are compared.

    The last `held_out` samples are never shown to a solver. The 16-bit stream carries the last samples only, held out
    and some before them: how far the quantized model has drifted needs fewer tokens than a Hessian.
    """

    quantized: Stream
    exact: Stream | None
    held_out: int

    def compared(self, of_all: Tensor) -> Tensor:
        """The part of `of_all: [S, ...]` that belongs to the samples of the 16-bit stream."""
        assert self.exact is not None
        return of_all[len(of_all) - len(self.exact.x) :]


def quantize_block(task: BlockTask, streams: Streams | None) -> None:
    """Fill task.solved, task.changed and task.rows, and move the streams behind the block.

    `streams` None means a recipe without calibration: weights are rounded as they stand.
    """
    for stage, names in enumerate(INPUT_GROUPS):
        if streams is not None:
            streams.quantized.enter(task.block, task.layer, stage)
            if streams.exact is not None and task.exact is not None:
                streams.exact.enter(task.exact, task.layer, stage)
        scheme = task.schemes[names[0]]
        if scheme is not None:
            try:
                _quantize_group(task, streams, stage, scheme)
            except SolveError as error:
                error.where = block_prefix(task.layer) + names[0]
                raise
        if streams is not None and stage in (1, 3):
            streams.quantized.leave(task.block, stage)
            if streams.exact is not None and task.exact is not None:
                streams.exact.leave(task.exact, stage)


def _quantize_group(task: BlockTask, streams: Streams | None, stage: int, scheme: Scheme) -> None:
    started = time.perf_counter()
    release_freed_memory()
    names = INPUT_GROUPS[stage]
    w = torch.cat([weight_of(task.block.get_submodule(name)).float() for name in names])
    problem, moments, held_out = Problem(w, scheme, task.scale_dtype), None, None
    if streams is not None:
        moments = collect(streams.quantized, streams.held_out)
        held_out = held_out_tokens(streams, stage, w)
        residual = None
        if isinstance(task.solver, Gptq) and task.solver.target_correction > 0 and streams.exact is not None:
            residual = target_residual(streams, stage, w)
        problem = Problem(w, scheme, task.scale_dtype, moments.hessian, residual)
    plain = plain_rounding(Problem(w, scheme, task.scale_dtype), held_out)
    solution, fold = _best_solution(task, streams, stage, problem, (held_out, plain))
    modules = row_slices(group_rows(task.block, names))
    if fold is None:  # a folded group cannot be mixed: its columns are scaled for all rows
        solution, kept = better_rows(solution, plain, modules)
    else:
        kept = [True] * len(modules)
        apply_fold(task, fold)
        if streams is not None:
            streams.quantized.enter(task.block, task.layer, stage)  # the inputs that the folded feeder gives
    seconds = time.perf_counter() - started
    for name, rows, keep in zip(names, modules, kept, strict=True):
        install(task, name, solution.weight(rows, scheme.group_size or w.shape[1]), scheme)
        method = ("" if fold is None else f"{fold.method}:{fold.source} ") + solution.method
        row = ModuleRow(
            name=block_prefix(task.layer) + name,
            scheme=scheme,
            method=method if keep else plain.method,
            damping=solution.damping,
            retries=solution.retries,
            tokens=0 if moments is None else moments.tokens,
            error=solution.relative_error(rows),
            rtn_error=plain.relative_error(rows),
        )
        _record(task, row, solution, seconds / len(names), keep)


def _record(task: BlockTask, row: ModuleRow, solution: Solution, seconds: float, keep: bool) -> None:
    task.rows.append(row)
    if solution.retries:
        task.listener(Notice(f"{row.name}: damping raised to {solution.damping:g} after {solution.retries} retries"))
    if not keep:
        task.listener(Notice(f"{row.name}: plain rounding was better on held-out blocks and is kept"))
    task.listener(ModuleDone(task.layer, row.name, row.method, row.error, row.rtn_error, seconds))


def _best_solution(
    task: BlockTask,
    streams: Streams | None,
    stage: int,
    problem: Problem,
    seen: tuple[HeldOut | None, Solution],
) -> tuple[Solution, Fold | None]:
    """The solved group, with the fold that held-out tokens prefer to none; `seen` ends with plain rounding's result."""
    held_out, plain = seen
    solution = solve_problem(problem, task.solver, held_out)
    _check_finite(solution)
    how = task.fold_pass
    if how is None or streams is None or FOLD_SOURCES[stage] not in how.pairs:
        return solution, None
    fold = find_fold(task, stage, how, problem, seen_inputs(streams, problem))
    if fold is None:
        return solution, None
    folded = solve_problem(problem.folded(fold.columns), task.solver, held_out)
    modules = row_slices(group_rows(task.block, INPUT_GROUPS[stage]))
    never_worse = all(folded.relative_error(rows) <= plain.relative_error(rows) for rows in modules)
    if never_worse and float(folded.errors.sum()) < float(solution.errors.sum()):
        return folded, fold
    return solution, None


def _check_finite(solution: Solution) -> None:
    if not bool(torch.isfinite(solution.errors).all()):
        raise SolveError("the solve gave NaN or Inf", fix="a larger damping in the recipe, or ignore the module")


def collect(stream: Stream, held_out: int) -> Moments:
    """Moments of the group's inputs over the samples that solvers may see."""
    x = stream.inputs[: len(stream.inputs) - held_out].flatten(0, 1)
    moments = Moments.empty(x.shape[1], x.device)
    for part in x.split(stream.batch * stream.x.shape[1]):
        moments.add(part)
    moments.finish()
    return moments


def target_residual(streams: Streams, stage: int, w: Tensor) -> Tensor:
    """The mean of x (y - W x)^T `[K, N]` over the solver's samples; see `_wanted_gap` for y.

    Where a group has more outputs than inputs, the gap of the inputs is summed and W applied to the sum: less work.
    """
    exact, quantized = streams.exact, streams.quantized
    assert exact is not None
    seen, (outputs, inputs) = len(exact.inputs) - streams.held_out, w.shape
    by_inputs = outputs > inputs and stage in (0, 2)
    total = torch.zeros(inputs, inputs if by_inputs else outputs, device=w.device)
    for start in range(0, seen, quantized.batch):
        part = slice(start, min(start + quantized.batch, seen))
        x = streams.compared(quantized.inputs)[part]
        gap = exact.inputs[part] - x if by_inputs else _wanted_gap(streams, stage, w, part).to(x.dtype)
        add_product(total, x.flatten(0, 1), gap.flatten(0, 1), start * x.shape[1])
    total /= seen * quantized.x.shape[1]
    return total @ w.t() if by_inputs else total


def _wanted_gap(streams: Streams, stage: int, w: Tensor, part: slice, stride: int = 1) -> Tensor:
    """What W x lacks, `[S, T / stride, N]` fp32, in every `stride`-th token of the compared samples in `part`.

    That is the 16-bit linear's output, plus how far the residual has drifted where it is added.
    """
    exact, quantized = streams.exact, streams.quantized
    assert exact is not None
    drift = exact.inputs[part, ::stride] - streams.compared(quantized.inputs)[part, ::stride]
    gap = (drift @ w.t().to(drift.dtype)).float()
    if stage in (1, 3):
        gap += exact.x[part, ::stride] - streams.compared(quantized.x)[part, ::stride]
    return gap


def held_out_tokens(streams: Streams, stage: int, w: Tensor) -> HeldOut:
    """The held-out samples' inputs and the outputs wanted for them: the 16-bit model's where that is at hand."""
    part = slice(-streams.held_out, None)
    samples, tokens = streams.quantized.x.shape[:2]
    stride = max(1, min(streams.held_out, samples) * tokens // HELD_OUT_TOKENS)
    x = streams.quantized.inputs[part, ::stride].float()
    y = x @ w.t()
    if streams.exact is not None:
        y += _wanted_gap(streams, stage, w, part, stride)
    return HeldOut(x.flatten(0, 1).contiguous(), y.flatten(0, 1))


def seen_inputs(streams: Streams, problem: Problem) -> Inputs:
    """What a search of folds may see of the group's inputs: the solver's samples."""
    assert problem.hessian is not None
    x = streams.quantized.inputs[: len(streams.quantized.inputs) - streams.held_out]
    absmax = torch.stack([part.abs().amax((0, 1)) for part in x.split(streams.quantized.batch)]).amax(0).float()
    return Inputs(x.flatten(0, 1), absmax, problem.hessian.diagonal())


def row_slices(sizes: list[int]) -> list[slice]:
    """Where each of the stacked linears' rows lie."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
