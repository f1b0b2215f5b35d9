"""One decoder block run in stages over all calibration samples, stopping at the input of each group of linears.

Every stage runs once: a group is solved on the inputs that its already quantized predecessors produce, and those same
inputs carry on. Knows nothing about solvers or files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.models.attention import Attend, attend_causal
from quantlab.models.config import ModelConfig
from quantlab.models.layers import DecoderBlock
from quantlab.models.rope import RopeTables, block_rope
from quantlab.quant.device import Place

# Tokens in flight through a block at once.
MICRO_TOKENS = 4096


class Stream:
    """Hidden states of all samples on their way through the blocks.

    x: [S, T, hidden] fp32, the residual; inputs: [S, T, K] in the compute dtype, the input of the group at hand.
    """

    def __init__(self, x: Tensor, config: ModelConfig, place: Place):
        self.x, self.config, self.place = x, config, place
        self.inputs = x.new_empty(0)
        self.batch = max(1, MICRO_TOKENS // x.shape[1])

    @torch.no_grad()
    def enter(self, block: DecoderBlock, layer: int, stage: int) -> None:
        """Compute the inputs of group `stage` (0 q/k/v, 1 o, 2 gate/up, 3 down) of `block` from the residual."""
        rope = block_rope(self.config, layer, torch.arange(self.x.shape[1]), self.place.device)
        attend = WideAttention(self.config.layer_window(layer))
        parts = []
        for x in self.x.split(self.batch):
            with self.place.forward():
                parts.append(stage_input(block, stage, x, rope, attend).to(self.place.compute))
        self.inputs = torch.cat(parts)

    @torch.no_grad()
    def leave(self, block: DecoderBlock, stage: int) -> None:
        """Add the output of group `stage` (1 or 3), as `block` computes it now, to the residual."""
        for start in range(0, len(self.x), self.batch):
            part = slice(start, start + self.batch)
            with self.place.forward():
                step = block.after_attention if stage == 1 else block.after_mlp
                self.x[part] = step(self.x[part], self.inputs[part])
        self.inputs = self.x.new_empty(0)

    def run(self, block: DecoderBlock, layer: int) -> None:
        """Pass through the whole block; bit for bit what entering and leaving its stages one by one does."""
        for stage in (1, 3):
            self.enter(block, layer, stage)
            self.leave(block, stage)


@dataclass(frozen=True, slots=True)
class WideAttention:
    """Causal attention computed in fp32 on a CPU, where torch's bf16 kernel runs at less than half of the fp32 rate."""

    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, T, D] -> [B, H, T, D] in q's dtype."""
        if q.device.type != "cpu":
            return attend_causal(q, k, v, self.window)
        with torch.autocast("cpu", enabled=False):
            return attend_causal(q.float(), k.float(), v.float(), self.window).to(q.dtype)


def stage_input(block: DecoderBlock, stage: int, x: Tensor, rope: RopeTables | None, attend: Attend) -> Tensor:
    """The input of group `stage` of `block` for the residual x: [B, T, hidden] at the head of its half of the block."""
    if stage == 0:
        return block.attention_input(x)
    if stage == 1:
        return block.attention_output(block.attention_input(x), rope, attend)
    if stage == 2:
        return block.mlp_input(x)
    return block.mlp_hidden(block.mlp_input(x))
