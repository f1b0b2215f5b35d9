"""The decoder as a serving step runs it: a ragged batch of tokens in, states of the wanted ones out.

One path for every device: `Operations` are what a device does its own way. Computes what models.CausalLM does, with
q|k|v and gate|up fused and each residual sum taken by the norm behind it. Knows nothing about sequences or sampling.
"""

from typing import Protocol

from torch import Tensor

from quantlab.runtime.linears import Activations
from quantlab.runtime.step import Step
from quantlab.runtime.weights import Block, Weights


class Attend(Protocol):
    """Attention of one step, prepared for all layers."""

    def __call__(self, layer: int, block: Block, qkv: Tensor) -> Tensor:
        """qkv: [T, (H + 2 H_kv) * D] -> what o takes: [T, H * D]; writes the layer's keys and values."""


class Operations(Protocol):
    """What a device does its own way, besides linears; `int8` asks for Int8Rows, which some linears take."""

    def embed(self, weights: Weights, step: Step, last: Tensor) -> Tensor:
        """States [T, hidden] of the step's tokens; last: [slots] int64, the token last sampled for each slot."""

    def norm(self, x: Tensor, weight: Tensor, eps: float, int8: bool) -> Activations:
        """RMSNorm of x: [T, hidden]."""

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float, int8: bool) -> tuple[Activations, Tensor]:
        """RMSNorm of x + more, and x + more itself; all [T, hidden]; x may be overwritten."""

    def gate(self, x: Tensor, int8: bool) -> Activations:
        """SiLU of the first half of the columns times the second; x: [T, 2 I] -> [T, I]."""

    def attention(self, weights: Weights, step: Step) -> Attend:
        """The step's attention."""


def hidden_states(weights: Weights, operations: Operations, step: Step, last: Tensor) -> Activations:
    """States after the final norm of the step's `rows`: [R, hidden]; `last` as in `Operations.embed`."""
    eps = weights.config.rms_norm_eps
    x = operations.embed(weights, step, last)
    attend = operations.attention(weights, step)
    first = weights.blocks[0]
    h = operations.norm(x, first.input_norm, eps, first.qkv.takes_int8)
    following = [(block.input_norm, block.qkv) for block in weights.blocks[1:]] + [(weights.norm, weights.head)]
    for layer, (block, (norm, reader)) in enumerate(zip(weights.blocks, following, strict=True)):
        a = attend(layer, block, block.qkv(h))
        if layer == len(weights.blocks) - 1 and not step.every_row:
            # Behind the last attention, tokens whose logits nobody wants are not computed.
            x, a = x[step.rows], a[step.rows]
        h, x = operations.add_norm(x, block.o(a), block.mlp_norm, eps, block.gate_up.takes_int8)
        g = operations.gate(block.gate_up(h), block.down.takes_int8)
        h, x = operations.add_norm(x, block.down(g), norm, eps, reader.takes_int8)
    return h
