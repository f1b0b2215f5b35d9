"""A decoder block on its way to being quantized: what is to be done, and what has been found so far.

Knows how a quantized linear stands in the block; knows nothing about solvers, streams or files.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantlab.checkpoint.linear import W8A8Linear
from quantlab.events import Listener
from quantlab.models.config import ModelConfig
from quantlab.models.layers import DecoderBlock
from quantlab.quant.device import Place
from quantlab.quant.report import ModuleRow
from quantlab.recipe import Awq, Gptq, Recipe, Rtn, SmoothQuant
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize


@dataclass(slots=True)
class BlockTask:
    """A block to quantize: `block` is changed in place, `exact` stays 16-bit (None when nothing compares with it).

    stored: the dtype of each of the block's tensors in the checkpoint, which the output keeps; it may be narrower than
    the one that the block is run in.
    """

    config: ModelConfig
    layer: int
    block: DecoderBlock
    exact: DecoderBlock | None
    schemes: dict[str, Scheme | None]
    recipe: Recipe
    place: Place
    stored: dict[str, torch.dtype]
    listener: Listener
    solved: dict[str, QuantizedWeight] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    rows: list[ModuleRow] = field(default_factory=list)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales on disk: that of the weights."""
        return self.stored["self_attn.q_proj.weight"]

    @property
    def solver(self) -> Gptq | Rtn:
        """The recipe's one solving pass."""
        return next(p for p in self.recipe.passes if isinstance(p, Gptq | Rtn))

    @property
    def fold_pass(self) -> Awq | SmoothQuant | None:
        """The recipe's folding pass, if it has one."""
        return next((p for p in self.recipe.passes if isinstance(p, Awq | SmoothQuant)), None)


def install(task: BlockTask, name: str, q: QuantizedWeight, scheme: Scheme) -> None:
    """Put the quantized linear `name` into the block, as engines will compute it."""
    task.solved[name] = q
    parent, _, child = name.rpartition(".")
    linear = task.block.get_submodule(name)
    setattr(task.block.get_submodule(parent), child, quantized_linear(q, scheme, bias_of(linear), task.place))


def quantized_linear(q: QuantizedWeight, scheme: Scheme, bias: Tensor | None, place: Place) -> nn.Module:
    """A module that computes with `q`: dequantized for weight-only schemes, INT8 activations for W8A8."""
    if scheme.quantizes_activations:
        return W8A8Linear(q, bias)
    linear = nn.Linear(q.codes.shape[1], q.codes.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dequantize(q).to(place.compute), requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return linear


def group_rows(block: DecoderBlock, names: tuple[str, ...]) -> list[int]:
    """Output features of each of the linears `names` of a block that are not quantized yet."""
    return [weight_of(block.get_submodule(name)).shape[0] for name in names]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a norm, or of a linear that is not quantized to INT8 activations."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.data


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias of any kind of linear, or None."""
    bias = linear.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias
