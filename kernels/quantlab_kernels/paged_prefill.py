"""Causal attention of chunks of new tokens over their own cache in blocks, cached prefix included.

A program takes one KV head and `ROWS // G` tokens of a chunk with all G query heads of the group, packed into the rows
of one tile, so that K and V pass once for the group (FlashAttention-2, arXiv 2307.08691). Heavy tiles start first. The
keys that every row sees whole need no mask; those at the diagonal and at a window's far edge do.

This file holds the launcher and the kernel for any GPU; `paged_prefill_hopper` holds the faster one for sm_90. Both
read 16-bit caches: of an INT8 one, the tokens that a chunk sees are dequantized first (`paged_dequantize`). Neither
splits the keys: the same input gives the same bits.
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
from quantlab_kernels.paged_dequantize import dequantize_pages
from quantlab_kernels.paged_prefill_hopper import is_known, launch_hopper
from quantlab_kernels.rows import empty_rows

# A group must fit the rows of the smallest tile.
MOST_HEADS = 64
# Tokens dequantized at a time, if it is more than one sequence's: 128 MB in Llama-3-8B's shape.
DEQUANTIZED_TOKENS = 32768


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
    return Tile(64, 32, 4, 2) if cache.head_dim > 128 else Tile(128, 64, 8, 3)


@triton.jit
def _load_block(
    k_cache, v_cache, blocks, head, start, lowest, n,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values of one step, [KEYS, DIM] each."""
    # Outside lowest .. n - 1: a token that exists, masked later (a slot never written may hold NaN).
    t = tl.minimum(tl.maximum(start + tl.arange(0, KEYS), lowest), n - 1)
    block = tl.load(blocks + t // BLOCK_SIZE).to(tl.int64)
    row = (block * KV_HEADS + head) * BLOCK_SIZE + t % BLOCK_SIZE
    channel = tl.arange(0, DIM)
    inside = (channel < HEAD_DIM)[None, :]
    at = row[:, None] * HEAD_DIM + channel[None, :]
    return tl.load(k_cache + at, inside, 0), tl.load(v_cache + at, inside, 0)


@triton.jit
def _step(most, total, acc, queries, k, v, scale, ok, MASK: tl.constexpr):
    """Scores, softmax and output of one step; `ok` [ROWS, KEYS] says which keys a row sees."""
    scores = tl.dot(queries, tl.trans(k))
    if MASK:
        scores = tl.where(ok, scores, -float("inf"))
    # `most` begins finite, so a row that sees no key of this step adds exp2(-inf) = 0 and not NaN. The scale is
    # positive, so it may wait until the maximum is known: one fused multiply-add a score.
    larger = tl.maximum(most, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - larger[:, None])
    shrink = tl.exp2(most - larger)
    total = total * shrink + tl.sum(p, 1)
    return larger, total, tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit
def _masked_steps(
    most, total, acc, queries, k_cache, v_cache, table, position, scale, window, head, begin, end, lowest, n,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """The steps from key `begin` up to `end`, of which some rows do not see all keys."""
    for start in tl.range(begin, end, KEYS, num_stages=2):
        k, v = _load_block(
            k_cache, v_cache, table, head, start, lowest, n, KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE
        )  # fmt: skip
        key = start + tl.arange(0, KEYS)
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > (position - window)[:, None]
        most, total, acc = _step(most, total, acc, queries, k, v, scale, seen, MASK=True)
    return most, total, acc


@triton.jit(do_not_specialize=["table_stride", "window"])
def _prefill_kernel(
    q, k_cache, v_cache, blocks, lengths, starts, out, scale, q_stride, table_stride, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr,
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
        # Keys that every row sees: from the first that the latest token's window holds to the earliest token.
        whole = tl.cdiv(tl.maximum(end - window, 0), KEYS) * KEYS
        until = tl.maximum(tl.maximum(earliest + 1, 0) // KEYS * KEYS, whole)
        if WINDOW:
            most, total, acc = _masked_steps(
                most, total, acc, queries, k_cache, v_cache, table, position, scale, window, head,
                lowest // KEYS * KEYS, tl.minimum(whole, end), lowest, n, KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE,
                WINDOW,
            )  # fmt: skip
        for start in tl.range(whole, until, KEYS, num_stages=STAGES):
            k, v = _load_block(
                k_cache, v_cache, table, head, start, lowest, n, KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE
            )  # fmt: skip
            most, total, acc = _step(most, total, acc, queries, k, v, scale, True, MASK=False)
        most, total, acc = _masked_steps(
            most, total, acc, queries, k_cache, v_cache, table, position, scale, window, head, until, end, lowest, n,
            KV_HEADS, HEAD_DIM, DIM, KEYS, BLOCK_SIZE, WINDOW,
        )  # fmt: skip
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
    Returns out in q's dtype. Of an INT8 cache up to DEQUANTIZED_TOKENS, or one sequence, are kept in 16 bits meanwhile.
    Raises ValueError.
    """
    _check(q, cache, pages, chunks, scale, window)
    out = empty_rows(len(q), q.shape[1] * q.shape[2], q.dtype, q.device).view(q.shape) if out is None else out
    require(out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), "out must be contiguous, as q else")
    if q.shape[0] == 0:
        return out
    log2_scale = (cache.head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    if not cache.is_int8:
        _launch(q, cache, pages, chunks, (log2_scale, window), out)
        return out
    at_once = max(1, DEQUANTIZED_TOKENS // max(pages.max_length, 1))
    for first in range(0, pages.lengths.shape[0], at_once):
        some = slice(first, first + at_once)
        part = Pages(pages.blocks[some], pages.lengths[some], pages.max_length)
        part_chunks = Chunks(chunks.starts[first : first + at_once + 1], chunks.longest)
        wide, part = dequantize_pages(cache, part, part_chunks.starts, q, window)
        _launch(q, wide, part, part_chunks, (log2_scale, window), out)
    return out


def _launch(
    q: Tensor, cache: KVCache, pages: Pages, chunks: Chunks, scores: tuple[float, int | None], out: Tensor
) -> None:
    """One launch over a 16-bit cache; scores: log2(e) * scale, and the window."""
    log2_scale, window = scores
    if is_known(q, cache):
        launch_hopper(q, cache, pages, (chunks.starts, chunks.longest), (log2_scale, window or NO_WINDOW), out)
        return
    tile, group = choose_tile(cache), q.shape[1] // cache.kv_heads
    _prefill_kernel[(cache.kv_heads, triton.cdiv(chunks.longest, tile.rows // group), pages.lengths.shape[0])](
        q, cache.k, cache.v, pages.blocks, pages.lengths, chunks.starts, out, log2_scale,
        q.stride(0), pages.blocks.shape[1], window or NO_WINDOW,
        KV_HEADS=cache.kv_heads, GROUP=group, HEAD_DIM=cache.head_dim, DIM=triton.next_power_of_2(cache.head_dim),
        ROWS=tile.rows, KEYS=tile.keys, BLOCK_SIZE=cache.block_size, WINDOW=window is not None, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _check(q: Tensor, cache: KVCache, pages: Pages, chunks: Chunks, scale: float | None, window: int | None) -> None:
    require(q.dim() == 3 and q.shape[1] % cache.kv_heads == 0, f"q must be [T, n * {cache.kv_heads}, D]")
    check_heads("q", q, q.shape[1], cache)
    require(chunks.starts.shape[0] == pages.lengths.shape[0] + 1, "starts must have one entry more than lengths")
    require(chunks.starts.device == pages.lengths.device == q.device, "starts, lengths and q must be on one device")
    require(window is None or window > 0, "a window holds one token at least")
    require(scale is None or scale > 0, f"the scale of the scores is {scale}; it must be positive")
    group = q.shape[1] // cache.kv_heads
    require(group <= MOST_HEADS, f"{group} query heads on a KV head; prefill takes {MOST_HEADS} at most")
