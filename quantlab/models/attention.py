"""Causal attention over a whole sequence, or over a cache that grows step by step.

Knows nothing about projections, rotation or layers: queries, keys and values in, mixed values out.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantlab.models.config import ModelConfig


class Attend(Protocol):
    """Mixes values: q: [B, H, T, D], k and v: [B, H_kv, T, D], returns [B, H, T, D]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each query's softmax-weighted mean of the values that it may see."""


@dataclass(frozen=True, slots=True)
class DenseAttention:
    """Causal attention within the T tokens given; `window` limits how many of them each token sees."""

    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, T, D] -> [B, H, T, D]."""
        return attend_causal(q, k, v, self.window)


class KVCache:
    """Keys and values of every layer for up to `capacity` tokens: [B, H_kv, capacity, D] each."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v: [B, H_kv, T, D] behind what is held; returns views of all of the layer's keys and values."""
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache of {self.capacity}"
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as held; called once all layers have written them."""
        self.length += tokens


@dataclass(frozen=True, slots=True)
class CachedAttention:
    """Causal attention of new tokens over themselves and all that `cache` holds for `layer`."""

    cache: KVCache
    layer: int
    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, T, D] of the new tokens -> [B, H, T, D]."""
        return attend_causal(q, *self.cache.write(self.layer, k, v), self.window)


@dataclass(frozen=True, slots=True)
class MaskedAttention:
    """Attention in which `mask`, [B or 1, 1, T, S] bool, says which of S keys each of T queries sees."""

    mask: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, S, D] -> [B, H, T, D]; each query must see at least one key."""
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of the last T of S tokens; q: [B, H, T, D], k, v: [B, H_kv, S, D] -> [B, H, T, D]."""
    queries, keys = q.shape[2], k.shape[2]
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    if window is None or window >= keys:
        if queries == 1:
            return scaled_dot_product_attention(q, k, v)
        if queries == keys:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
    return scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(queries, keys, window, q.device))


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x: [B, H_kv, S, D] -> [B, H, S, D] for grouped queries: head h reads h // (H / H_kv)."""
    # A copy is cheap beside the linears and keeps every fused kernel eligible: on a GPU none groups heads in fp32.
    repeats = heads // x.shape[1]
    return x if repeats == 1 else x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[T, S] bool, True where the last T of S tokens may look: not ahead, and no further back than the window."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
