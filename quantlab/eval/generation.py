"""Greedy continuation of prompts in batches, with keys and values kept from step to step.

Knows nothing about text: the caller says when a continuation is finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import NumericsError
from quantlab.models.attention import KVCache, MaskedAttention, causal_mask
from quantlab.models.decoder import CausalLM

Finished = Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True)
class PaddedAttention:
    """Causal attention over a cache whose rows begin with `padding`, [B] int64 on the cache's device, unused places."""

    cache: KVCache
    layer: int
    window: int | None
    padding: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, H, T, D], k, v: [B, H_kv, T, D] of the new tokens -> [B, H, T, D]."""
        keys, values = self.cache.write(self.layer, k, v)
        queries, held = q.shape[2], keys.shape[2]
        index = torch.arange(held, device=q.device)
        # Padding sees itself alone: a query without any key would be NaN, and NaN values spoil every sum they are in.
        own = index == index[held - queries :, None]
        used = index >= self.padding[:, None, None]
        mask = (causal_mask(queries, held, self.window, q.device) & used) | own
        return MaskedAttention(mask[:, None])(q, keys, values)


def generate(model: CausalLM, prompts: Sequence[list[int]], new_tokens: int, finished: Finished) -> list[list[int]]:
    """Each prompt's likeliest next tokens, at least one and at most `new_tokens`, all prompts in one batch.

    A row ends when `finished` says so of its new tokens, the last of which is included.
    Raises NumericsError where logits are NaN or infinite.
    """
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    width = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = KVCache(model.config, len(prompts), width + new_tokens, dtype, device)
    rows: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    with torch.inference_mode():
        for _ in range(new_tokens):
            chosen = _step(model, ids, cache, padding)
            for index, token in enumerate(chosen):
                if not ended[index]:
                    rows[index].append(token)
                    ended[index] = finished(rows[index])
            if all(ended):
                break
            ids = torch.tensor(chosen, device=device)[:, None]
    return rows


def _step(model: CausalLM, ids: Tensor, cache: KVCache, padding: Tensor) -> list[int]:
    """The likeliest token after ids: [B, T] int64, which continue what the cache holds."""
    places = torch.arange(cache.length, cache.length + ids.shape[1], device=ids.device)
    positions = (places - padding[:, None]).clamp(min=0)

    def attend(layer: int) -> PaddedAttention:
        return PaddedAttention(cache, layer, model.config.layer_window(layer), padding)

    states = model.states(ids, positions, attend)
    cache.advance(ids.shape[1])
    logits = model.logits(states[:, -1]).float()
    if not logits.isfinite().all():
        raise NumericsError("the model's logits are NaN or infinite", fix="--dtype float32, or another recipe")
    return [int(token) for token in logits.argmax(-1).tolist()]
