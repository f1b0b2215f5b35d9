"""Compiles what the attention of a model will launch, before a request waits for it.

Each distinct kernel is launched once on a scratch cache of two blocks, on sequences without tokens: nothing is
computed, and later launches of any batch and length find their kernel. Knows nothing about models.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from quantlab_kernels.decode_parts import PART_BUCKETS
from quantlab_kernels.kv_cache import HeadNorm, KVCache, Pages, Rope, empty_cache, write_kv
from quantlab_kernels.paged_decode import choose_plan, paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill


@dataclass(frozen=True, slots=True)
class Limits:
    """What will be served: sequences a batch, tokens a sequence; settled: whether decode steps promise it (`Pages`)."""

    sequences: int
    tokens: int
    settled: bool = False


def decode_shapes(q: Tensor, cache: KVCache, limits: Limits, window: int | None) -> list[tuple[int, int]]:
    """(sequences, tokens) of decode steps that between them launch every kernel that any step within `limits` does.

    q: any queries of the model, [T, H, D]. Powers of two are enough for tokens: twice the tokens make at most twice the
    parts, and the bounds at which another kernel adds the parts lie further apart.
    """
    lengths = sorted({1 << i for i in range(limits.tokens.bit_length())} | {limits.tokens})
    shapes: dict[tuple[int, ...], tuple[int, int]] = {}
    for sequences in range(1, limits.sequences + 1):
        for tokens in lengths:
            plan = choose_plan(q, cache, sequences, tokens, window)
            bucket = next(bucket for bucket in (1, *PART_BUCKETS) if plan.parts <= bucket)
            shapes.setdefault((plan.warps, plan.tokens, plan.stages, bucket), (sequences, tokens))
    return list(shapes.values())


def warm_attention(
    q: Tensor,
    k: Tensor,
    cache: KVCache,
    limits: Limits,
    rope: Rope | None,
    norm: HeadNorm | None,
    windows: set[int | None],
) -> int:
    """Launch every attention kernel of a model once; returns how many launches that took.

    q: [T, H, D], k: [T, KV heads, D], T > 0: views with the strides that the model's have, contents are not read or
    kept; cache: a layer's, it is not written; rope, norm: as the model passes them (positions of any T tokens);
    windows: those of the model's layers, None for a layer that sees all.
    """
    scratch = empty_cache(2, cache.kv_heads, cache.block_size, cache.head_dim, q, cache.is_int8)
    slots = torch.full((q.shape[0],), -1, dtype=torch.int64, device=q.device)
    write_kv(scratch, q.clone(), k.clone(), k, slots, rope, norm)
    launches = 1
    for window in windows:
        for sequences, tokens in decode_shapes(q, cache, limits, window):
            queries = q[:1].expand(sequences, -1, -1)
            paged_decode(queries, scratch, _no_tokens(sequences, tokens, q, limits.settled), window=window)
            launches += 1
        starts = torch.zeros(2, dtype=torch.int32, device=q.device)
        paged_prefill(q, scratch, _no_tokens(1, 1, q), Chunks(starts, 1), window=window)
        launches += 1
    return launches


def _no_tokens(sequences: int, tokens: int, like: Tensor, settled: bool = False) -> Pages:
    """Sequences of length 0 that a grid for `tokens` tokens serves."""
    blocks = torch.zeros(sequences, triton.cdiv(tokens, 16), dtype=torch.int32, device=like.device)
    return Pages(blocks, torch.zeros(sequences, dtype=torch.int32, device=like.device), tokens, settled)
