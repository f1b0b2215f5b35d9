"""A model's weights as the engine runs them: q|k|v and gate|up fused, each linear with its kernel.

Where tensors come from is a `Source`: a checkpoint folder, or random numbers for a bench. Knows nothing about
attention, caches or steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantlab.models.config import ModelConfig
from quantlab.models.naming import EMBEDDING, FINAL_NORM, INPUT_GROUPS, block_prefix
from quantlab.models.rope import attention_scale, inverse_frequencies
from quantlab.runtime.linears import Linear, MakeLinear, RawLinear, fuse

LM_HEAD = "lm_head"
# The fused linears of a block, in the order of naming.INPUT_GROUPS.
KINDS = ("qkv", "o", "gate_up", "down")


class Source(Protocol):
    """Weights by name, on the device that runs them and in the dtype of the activations."""

    config: ModelConfig

    def tensor(self, name: str) -> Tensor:
        """A float tensor by its full name in a 16-bit checkpoint."""

    def linear(self, module: str) -> RawLinear:
        """A linear by its full module name, quantized or not, with its bias."""

    def read_ahead(self, prefix: str) -> None:
        """What is asked for next: tensors whose names begin with `prefix`."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block; q_norm and k_norm: [D] where the family has them."""

    input_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model; cos and sin: [positions, D/2] fp32, scaled as the rotary embedding asks."""

    config: ModelConfig
    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    head: Linear
    cos: Tensor
    sin: Tensor

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Kind ("qkv", ..., "lm_head") and layer of every linear."""
        for block in self.blocks:
            yield from ((kind, getattr(block, kind)) for kind in KINDS)
        yield LM_HEAD, self.head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; a tied lm_head that shares the embedding's memory counts once."""
        norms = [n for block in self.blocks for n in (block.input_norm, block.mlp_norm, block.q_norm, block.k_norm)]
        small = self.norm.nbytes + sum(norm.nbytes for norm in norms if norm is not None)
        shared = getattr(self.head, "weight", None) is self.embedding
        return small + self.embedding.nbytes * (not shared) + sum(layer.nbytes for _, layer in self.linears())

    def kernels(self) -> tuple[str, ...]:
        """One line for each kernel: which kinds of linears it serves, and how many."""
        served: dict[str, list[str]] = {}
        for kind, layer in self.linears():
            served.setdefault(layer.kernel, []).append(kind)
        return tuple(
            f"{', '.join(dict.fromkeys(kinds))}: {kernel} ({len(kinds)} layer{'s' * (len(kinds) != 1)})"
            for kernel, kinds in served.items()
        )


class Maker(Protocol):
    """A device's choice of kernels."""

    def make_linear(self, raw: RawLinear) -> Linear:
        """The layer that runs `raw`."""

    def make_head(self, raw: RawLinear) -> Linear:
        """The output layer."""


def build_weights(source: Source, maker: Maker, positions: int) -> Weights:
    """All weights of `source`, each linear made as soon as it is read; rotary tables for `positions`."""
    config = source.config
    source.read_ahead(block_prefix(0))
    embedding = source.tensor(EMBEDDING)
    blocks = tuple(_block(source, maker.make_linear, layer) for layer in range(config.num_layers))
    tied = config.tie_word_embeddings
    head = maker.make_head(RawLinear(embedding, None, None) if tied else source.linear(LM_HEAD))
    cos, sin = rotary_tables(config, positions, embedding.device)
    return Weights(config, embedding, blocks, source.tensor(FINAL_NORM), head, cos, sin)


def rotary_tables(config: ModelConfig, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. positions - 1: two [positions, D/2] fp32."""
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    angles = torch.arange(positions)[:, None].float() * frequencies
    scale = attention_scale(config.rope)
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def _block(source: Source, make: MakeLinear, layer: int) -> Block:
    prefix = block_prefix(layer)
    last = layer + 1 == source.config.num_layers
    if not (last and source.config.tie_word_embeddings):
        source.read_ahead(LM_HEAD if last else block_prefix(layer + 1))
    fused = {
        kind: fuse([source.linear(prefix + name) for name in names], make)
        for kind, names in zip(KINDS, INPUT_GROUPS, strict=True)
    }
    norms = {
        side: source.tensor(f"{prefix}self_attn.{side}_norm.weight") if source.config.qk_norm else None for side in "qk"
    }
    return Block(
        source.tensor(prefix + "input_layernorm.weight"),
        source.tensor(prefix + "post_attention_layernorm.weight"),
        norms["q"],
        norms["k"],
        fused["qkv"],
        fused["o"],
        fused["gate_up"],
        fused["down"],
    )
