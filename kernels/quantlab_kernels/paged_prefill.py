"""Causal attention of chunks of new tokens over their own cache in blocks, cached prefix included.

A program takes one KV head and `ROWS // G` tokens of a chunk with all G query heads of the group, packed into the rows
of one tile, so that K and V pass once for the group (FlashAttention-2, arXiv 2307.08691). Heavy tiles start first. The
keys that every row sees whole need no mask; those at the diagonal, and all of them under a window, do.

This file holds the launcher and the kernel for any GPU and either cache; `paged_prefill_hopper` holds the faster one
for sm_90. Neither splits the keys: the same input gives the same bits.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.decode_parts import NO_WINDOW
from quantlab_kernels.kv_cache import KVCache, Pages, check_heads
from quantlab_kernels.launch import require
from quantlab_kernels.paged_prefill_hopper import is_known, launch_hopper

# A group must fit the rows of the smallest tile.
MOST_HEADS = 64


@dataclass(frozen=True, slots=True)
class Chunks:
    """New tokens of each sequence, one after the other. starts: [S + 1] int32, where they begin among the T queries;
    longest: what no chunk exceeds, known to the host."""

    starts: Tensor
    longest: int

    def __post_init__(self) -> None:
        require(self.starts.dtype == torch.int32 and self.starts.is_contiguous(), "starts must be contiguous int32")


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile: query rows, keys a step, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tile(cache: KVCache) -> Tile:
    """What fits registers and shared memory of any GPU since sm_80; measured on an H200 for head_dim 128."""
    if cache.is_int8:
        return Tile(64, 32 if cache.head_dim > 128 else 64, 4, 2)
    return Tile(64, 32, 4, 2) if cache.head_dim > 128 else Tile(128, 64, 8, 3)


@triton.jit
def _load_block(
    k_cache, v_cache, scales, blocks, head, start, lowest, n,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INT8: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys [KEYS, DIM] and values [KEYS, DIM] in the dtype of the product, and their scales [KEYS] (1 unless INT8)."""
    # Outside lowest .. n - 1: a token that exists, masked later (a slot never written may hold NaN).
    t = tl.minimum(tl.maximum(start + tl.arange(0, KEYS), lowest), n - 1)
    block = tl.load(blocks + t // BLOCK_SIZE).to(tl.int64)
    row = (block * KV_HEADS + head) * BLOCK_SIZE + t % BLOCK_SIZE
    channel = tl.arange(0, DIM)
    inside = (channel < HEAD_DIM)[None, :]
    k = tl.load(k_cache + row[:, None] * HEAD_DIM + channel[None, :], inside, 0)
    if INT8:
        k, place = k.to(dtype), (t % 16)[:, None]
        at = (row - t % 16)[:, None] * HEAD_DIM + (channel // 4 * 64 + channel % 4 * 4)[None, :]
        v = tl.load(v_cache + at + place // 4 * 16 + place % 4, inside, 0).to(dtype)
        scale_at = scales + (row - t % 16) * 2 + t % 16
        k_scale, v_scale = tl.load(scale_at), tl.load(scale_at + 16)
    else:
        v = tl.load(v_cache + row[:, None] * HEAD_DIM + channel[None, :], inside, 0)
        k_scale = tl.full((KEYS,), 1.0, tl.float32)
        v_scale = k_scale
    return k, v, k_scale, v_scale


@triton.jit
def _step(most, total, acc, queries, k, v, k_scale, v_scale, scale, ok, MASK: tl.constexpr, INT8: tl.constexpr):
    """Scores, softmax and output of one step; `ok` [ROWS, KEYS] says which keys a row sees."""
    scores = tl.dot(queries, tl.trans(k))
    if INT8:
        scores *= k_scale[None, :]
    if MASK:
        scores = tl.where(ok, scores, -float("inf"))
    # `most` begins finite, so a row that sees no key of this step adds exp2(-inf) = 0 and not NaN. The scale is
    # positive, so it may wait until the maximum is known: one fused multiply-add a score.
    larger = tl.maximum(most, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - larger[:, None])
    shrink = tl.exp2(most - larger)
    total = total * shrink + tl.sum(p, 1)
    if INT8:
        p *= v_scale[None, :]
    return larger, total, tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill_kernel(
    q, k_cache, v_cache, scales, blocks, lengths, starts, out, scale, q_stride, table_stride, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, INT8: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(2)
    TOKENS: tl.constexpr = ROWS // GROUP
    begin = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - begin
    n = tl.load(lengths + sequence)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last tokens see the most keys
    if tile * TOKENS < count:
        row, channel = tl.arange(0, ROWS), tl.arange(0, DIM)
        token = tile * TOKENS + row // GROUP
        row_ok = (token < count) & (row < TOKENS * GROUP)
        position = n - count + token  # the last key that a row sees
        at = (begin + token).to(tl.int64)[:, None] * q_stride + (head * GROUP + row % GROUP)[:, None] * HEAD_DIM
        ok = row_ok[:, None] & (channel < HEAD_DIM)[None, :]
        queries = tl.load(q + at + channel[None, :], ok, 0.0)
        most = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, DIM), tl.float32)
        table = blocks + sequence * table_stride
        earliest = n - count + tile * TOKENS
        end = tl.minimum(n, earliest + TOKENS)
        lowest = tl.maximum(earliest - window + 1, 0)
        whole = lowest // KEYS * KEYS
        if not WINDOW:
            whole = tl.maximum(earliest + 1, 0) // KEYS * KEYS
            for start in tl.range(0, whole, KEYS, num_stages=STAGES):
                k, v, k_scale, v_scale = _load_block(
                    k_cache, v_cache, scales, table, head, start, 0, n,
                    KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE, INT8, q.dtype.element_ty,
                )  # fmt: skip
                most, total, acc = _step(
                    most, total, acc, queries, k, v, k_scale, v_scale, scale, True, MASK=False, INT8=INT8
                )
        for start in tl.range(whole, end, KEYS, num_stages=STAGES if WINDOW else 2):
            k, v, k_scale, v_scale = _load_block(
                k_cache, v_cache, scales, table, head, start, lowest if WINDOW else 0, n,
                KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE, INT8, q.dtype.element_ty,
            )  # fmt: skip
            key = start + tl.arange(0, KEYS)
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen &= key[None, :] > (position - window)[:, None]
            most, total, acc = _step(
                most, total, acc, queries, k, v, k_scale, v_scale, scale, seen, MASK=True, INT8=INT8
            )
        acc *= tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        to = (begin + token).to(tl.int64)[:, None] * (KV_HEADS * GROUP) + (head * GROUP + row % GROUP)[:, None]
        tl.store(out + to * HEAD_DIM + channel[None, :], acc.to(out.dtype.element_ty), ok)


def paged_prefill(
    q: Tensor,
    cache: KVCache,
    pages: Pages,
    chunks: Chunks,
    scale: float | None = None,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's newest tokens over all it has in the cache, themselves included, causally.

    q: [T, H, D] fp16 or bf16, chunk after chunk (rows may have any stride); scale: of the scores, D^-1/2 unless given;
    window: how many tokens back a query sees; out: [T, H, D] contiguous, made if not given.
    Returns out in q's dtype. Raises ValueError.
    """
    group = _check(q, cache, pages, chunks, scale, window)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    require(out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), "out must be contiguous, as q else")
    if q.shape[0] == 0:
        return out
    log2_scale = (cache.head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    if is_known(q, cache):
        launch_hopper(q, cache, pages, (chunks.starts, chunks.longest), (log2_scale, window or NO_WINDOW), out)
        return out
    tile = choose_tile(cache)
    sequences = pages.lengths.shape[0]
    scales = cache.k if cache.scales is None else cache.scales
    _prefill_kernel[(cache.kv_heads, triton.cdiv(chunks.longest, tile.rows // group), sequences)](
        q, cache.k, cache.v, scales, pages.blocks, pages.lengths, chunks.starts, out, log2_scale,
        q.stride(0), pages.blocks.shape[1], window or NO_WINDOW,
        KV_HEADS=cache.kv_heads, GROUP=group, HEAD_DIM=cache.head_dim, DIM=triton.next_power_of_2(cache.head_dim),
        ROWS=tile.rows, KEYS=tile.keys, BLOCK_SIZE=cache.block_size, WINDOW=window is not None, INT8=cache.is_int8,
        STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _check(q: Tensor, cache: KVCache, pages: Pages, chunks: Chunks, scale: float | None, window: int | None) -> int:
    """Query heads of a group."""
    require(q.dim() == 3 and q.shape[1] % cache.kv_heads == 0, f"q must be [T, n * {cache.kv_heads}, D]")
    check_heads("q", q, q.shape[1], cache)
    require(chunks.starts.shape[0] == pages.lengths.shape[0] + 1, "starts must have one entry more than lengths")
    require(chunks.starts.device == pages.lengths.device == q.device, "starts, lengths and q must be on one device")
    require(window is None or window > 0, "a window holds one token at least")
    require(scale is None or scale > 0, f"the scale of the scores is {scale}; it must be positive")
    group = q.shape[1] // cache.kv_heads
    require(group <= MOST_HEADS, f"{group} query heads on a KV head; prefill takes {MOST_HEADS} at most")
    return group
