"""Which scales to fold for one group of linears, and how to carry the fold out in its block.

Knows the block's wiring (what feeds what); knows nothing about how well a fold does: `blockwise` asks held-out tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from quantlab.quant import awq, folds, smoothquant
from quantlab.quant.block_task import BlockTask, bias_of, install, weight_of
from quantlab.quant.solver import Problem
from quantlab.recipe import Awq, SmoothQuant
from quantlab_kernels.layout import QuantizedWeight

# What feeds each group: the fold's inverse goes there.
FOLD_SOURCES = ("norm", "v_o", "norm", "up_down")
NORMS = {0: "input_layernorm", 2: "post_attention_layernorm"}
FEEDERS = {1: "self_attn.v_proj", 3: "mlp.up_proj"}


@dataclass(frozen=True, slots=True)
class Fold:
    """Column scales `columns: [K]` fp32 of group `stage`, and what their source takes: a norm's new weight, or the
    divisors `[C]` of a linear's rows."""

    stage: int
    method: str
    columns: Tensor
    inverse: Tensor

    @property
    def source(self) -> str:
        """What the inverse is folded into: "norm", "v_o" or "up_down"."""
        return FOLD_SOURCES[self.stage]


def find_fold(
    task: BlockTask, stage: int, how: Awq | SmoothQuant, problem: Problem, inputs: smoothquant.Inputs
) -> Fold | None:
    """The fold that the search prefers for group `stage`, or None when it prefers none."""
    if isinstance(how, Awq):
        assert problem.hessian is not None
        scales = awq.search_scales(problem.w, problem.hessian, problem.scheme, how.grid_points, task.scale_dtype)
    else:
        strengths = _strengths(how)
        scales = smoothquant.search_scales(problem.w, inputs, problem.scheme, strengths, task.scale_dtype)
    if bool((scales == 1).all()):
        return None
    columns, inverse = _realize(task, stage, scales)
    return None if bool((columns == 1).all()) else Fold(stage, how.kind, columns, inverse)


def apply_fold(task: BlockTask, fold: Fold) -> None:
    """Change the block's norm, or the linear that feeds the group, so that the fold leaves the function as it was."""
    if fold.source == "norm":
        name = f"{NORMS[fold.stage]}.weight"
        task.changed[name] = fold.inverse
        task.block.get_submodule(NORMS[fold.stage]).weight.data = fold.inverse.to(task.place.compute)
        return
    name = FEEDERS[fold.stage]
    linear = task.block.get_submodule(name)
    bias = bias_of(linear)
    if bias is not None:
        bias.data = folds.divide_rows(bias.data, fold.inverse)
        task.changed[f"{name}.bias"] = bias.data.to(task.stored[f"{name}.bias"])
    if name not in task.solved:
        linear.weight.data = folds.divide_rows(weight_of(linear), fold.inverse)
        task.changed[f"{name}.weight"] = weight_of(linear).to(task.stored[f"{name}.weight"])
        return
    q = task.solved[name]
    divided = QuantizedWeight(q.codes, folds.divide_rows(q.scales, fold.inverse), q.zeros, q.group_size)
    scheme = task.schemes[name]
    assert scheme is not None
    install(task, name, divided, scheme)


def _strengths(how: SmoothQuant) -> tuple[float, ...]:
    if how.strength is not None:
        return (how.strength,)
    return tuple((i + 1) / (how.grid_points + 1) for i in range(how.grid_points))


def _realize(task: BlockTask, stage: int, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The scales that the source can take, as (columns, inverse)."""
    if FOLD_SOURCES[stage] == "norm":
        norm = weight_of(task.block.get_submodule(NORMS[stage])).to(task.stored[f"{NORMS[stage]}.weight"])
        inverse, columns = folds.fold_into_norm(norm, scales)
        return columns, inverse
    config = task.config
    shared = folds.per_kv_channel(scales, config.num_heads, config.num_kv_heads) if stage == 1 else scales
    rows = _dividable(task, FEEDERS[stage], shared)
    return (folds.per_query_channel(rows, config.num_heads, config.num_kv_heads) if stage == 1 else rows), rows


def _dividable(task: BlockTask, name: str, scales: Tensor) -> Tensor:
    """The divisors nearest to `scales: [C]` that the feeder's rows take exactly: any that its one scale a row comes to
    when rounded, or else powers of two."""
    linear = task.block.get_submodule(name)
    weight = task.solved[name].scales if name in task.solved else weight_of(linear)
    stored, bias = weight.to(task.stored[f"{name}.weight"]), bias_of(linear)
    if stored.shape[1] == 1 and bias is None:
        return folds.rounded_divisors(stored, scales / scales.median())
    scales = folds.dividable(stored, folds.powers_of_two(scales))
    if bias is None:
        return scales
    return folds.dividable(bias.data[:, None].to(task.stored[f"{name}.bias"]), scales)
