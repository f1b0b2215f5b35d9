"""One decoder block run in stages over all calibration samples, stopping at the input of each group of linears.

Every stage runs once: a group is solved on the inputs that its already quantized predecessors produce, and those same
inputs carry on. Knows nothing about solvers or files.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.models.attention import Attend, attend_causal
from quantlab.models.config import ModelConfig
from quantlab.models.layers import DecoderBlock
from quantlab.models.rope import RopeTables, block_rope
from quantlab.quant.amounts import CPU_MICRO_TOKENS, MICRO_TOKENS
from quantlab.quant.device import Place

# Queries that share one product with their keys: a longer block wastes work above the diagonal.
QUERY_BLOCK = 128


class Stream:
    """Hidden states of all samples on their way through the blocks.

    x: [S, T, hidden] fp32, the residual; inputs: [S, T, K] in the compute dtype, the input of the group at hand.
    """

    def __init__(self, x: Tensor, config: ModelConfig, place: Place):
        self.x, self.config, self.place = x, config, place
        self.inputs = x.new_empty(0)
        micro = CPU_MICRO_TOKENS if x.device.type == "cpu" else MICRO_TOKENS
        self.batch = max(1, micro // x.shape[1])
        self._buffer = x.new_empty(0, dtype=place.compute)  # kept: fresh pages cost as much as the copy into them

    @torch.no_grad()
    def enter(self, block: DecoderBlock, layer: int, stage: int) -> None:
        """Compute the inputs of group `stage` (0 q/k/v, 1 o, 2 gate/up, 3 down) of `block` from the residual."""
        rope = block_rope(self.config, layer, torch.arange(self.x.shape[1]), self.place.device)
        attend = CalibrationAttention(self.config.layer_window(layer))
        for start in range(0, len(self.x), self.batch):
            with self.place.forward():
                part = stage_input(block, stage, self.x[start : start + self.batch], rope, attend)
            if start == 0:
                self.inputs = self._room(part.shape[-1])
            self.inputs[start : start + self.batch] = part

    @torch.no_grad()
    def leave(self, block: DecoderBlock, stage: int) -> None:
        """Add the output of group `stage` (1 or 3), as `block` computes it now, to the residual."""
        for start in range(0, len(self.x), self.batch):
            part = slice(start, start + self.batch)
            with self.place.forward():
                step = block.after_attention if stage == 1 else block.after_mlp
                self.x[part] = step(self.x[part], self.inputs[part])
        self.inputs = self.x.new_empty(0)

    def _room(self, features: int) -> Tensor:
        """The buffer seen as the inputs of a group: [S, T, features]; it grows to the widest group."""
        shape = (*self.x.shape[:2], features)
        if self._buffer.numel() < math.prod(shape):
            self.inputs = self._buffer = self.x.new_empty(0)  # the old one goes before the new one comes
            self._buffer = self.x.new_empty(math.prod(shape), dtype=self.place.compute)
        return self._buffer[: math.prod(shape)].view(shape)

    def run(self, block: DecoderBlock, layer: int) -> None:
        """Pass through the whole block; bit for bit what entering and leaving its stages one by one does."""
        for stage in (1, 3):
            self.enter(block, layer, stage)
            self.leave(block, stage)


@dataclass(frozen=True, slots=True)
class CalibrationAttention:
    """Causal attention in the form that is fastest on the device at hand: see `attend_in_blocks` for bf16 on a CPU."""

    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, T, D] -> [B, H, T, D] in q's dtype."""
        if q.device.type != "cpu" or q.dtype == torch.float32:
            return attend_causal(q, k, v, self.window)
        with torch.autocast("cpu", enabled=False):
            if self.window is None or self.window >= q.shape[2]:
                return attend_in_blocks(q, k, v)
            return attend_causal(q.float(), k.float(), v.float(), self.window).to(q.dtype)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in blocks of queries, each a product with the keys up to it; shapes as in `attend_causal`.

    On CPUs that multiply bf16 this takes 0.6 of the time of torch's fused kernel in fp32 (0.5 of its bf16 kernel's).
    Scores are rounded to bf16, as transformers' eager attention does: 0.7 % of the output, against 0.2 %.
    """
    batch, heads, tokens, features = q.shape
    kv_heads, shared = k.shape[1], heads // k.shape[1]
    q = (q * features**-0.5).reshape(batch * kv_heads, shared, tokens, features)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    ahead = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q.dtype).triu(1)
    parts = []
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        rows = q[:, :, start:stop].flatten(1, 2)
        scores = torch.bmm(rows, k[:, :stop].transpose(1, 2)).unflatten(1, (shared, -1))
        scores[..., start:] += ahead[: stop - start, : stop - start]
        mixed = torch.bmm(scores.softmax(-1).flatten(1, 2), v[:, :stop])
        parts.append(mixed.unflatten(1, (shared, -1)))
    return torch.cat(parts, dim=2).view(batch, heads, tokens, features)


def stage_input(block: DecoderBlock, stage: int, x: Tensor, rope: RopeTables | None, attend: Attend) -> Tensor:
    """The input of group `stage` of `block` for the residual x: [B, T, hidden] at the head of its half of the block."""
    if stage == 0:
        return block.attention_input(x)
    if stage == 1:
        return block.attention_output(block.attention_input(x), rope, attend)
    if stage == 2:
        return block.mlp_input(x)
    return block.mlp_hidden(block.mlp_input(x))
