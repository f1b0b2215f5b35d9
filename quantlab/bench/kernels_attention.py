"""Attention kernels against their references and their baselines: random caches, checks, and one JSON line a row.

Knows nothing about models: shapes are those of Llama-3-8B (32 query heads on 8 KV heads of 128) unless said.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.kv_cache import TILE_TOKENS, KVCache, Pages, empty_cache
from quantlab_kernels.ref_attention import tile_values, untile_values

# What no kernel may follow: an entry of a block table past the end of its sequence.
NOWHERE = 1 << 30


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads, channels of a head, tokens of a cache block."""

    query: int
    kv: int
    dim: int
    block_size: int = 16


def random_cache(heads: Heads, blocks: int, like: Tensor, int8: bool) -> KVCache:
    """A cache of random keys and values of order one, on like's device and in its dtype (or INT8)."""
    cache = empty_cache(blocks, heads.kv, heads.block_size, heads.dim, like, int8)
    for x in (cache.k, cache.v):
        x.random_(-127, 128) if int8 else x.normal_()
    if cache.scales is not None:
        cache.scales.uniform_(0.5, 1.5).mul_(1 / 64)
    return cache


def scattered_pages(lengths: list[int], heads: Heads, device: torch.device | str, spare: int = 3) -> tuple[Pages, int]:
    """Sequences whose blocks lie in random order among a few that nobody uses, and the number of blocks in all."""
    counts = [-(-length // heads.block_size) for length in lengths]
    total = sum(counts) + spare
    order = torch.randperm(total, device=device).to(torch.int32)
    blocks = torch.full((len(lengths), max(counts, default=0) + 2), NOWHERE, dtype=torch.int32, device=device)
    taken = 0
    for i, count in enumerate(counts):
        blocks[i, :count] = order[taken : taken + count]
        taken += count
    return Pages(blocks, torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths, default=0)), total


def poison_unwritten(cache: KVCache, pages: Pages) -> None:
    """NaN in every slot that holds no token (in its scales, for INT8), as memory that was never written may have."""
    written = torch.zeros(cache.k.shape[0], cache.block_size, dtype=torch.bool, device=cache.k.device)
    for row, length in zip(pages.blocks, pages.lengths.tolist(), strict=True):
        used = row[: -(-length // cache.block_size)].long()
        here = torch.arange(used.numel() * cache.block_size, device=row.device) < length
        written[used] = here.view(-1, cache.block_size)
    if cache.scales is None:
        for x in (cache.k, cache.v):
            x.masked_fill_(~written[:, None, :, None], float("nan"))
    else:
        cache.scales.masked_fill_(~written.view(-1, 1, cache.block_size // TILE_TOKENS, 1, TILE_TOKENS), float("nan"))
        # Codes have no NaN; their largest values stand for garbage.
        cache.k.masked_fill_(~written[:, None, :, None], -128)
        values = untile_values(cache.v).masked_fill_(~written[:, None, :, None], -128)
        cache.v.copy_(tile_values(values))
