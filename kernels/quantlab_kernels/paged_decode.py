"""Attention of one new token a sequence over its cache in blocks, cut along the tokens (Flash-Decoding).

A program takes one KV head of one sequence and one of `parts` equal parts of its tokens; all query heads of the group
share its one pass over K and V. The grid depends on batch, `max_length` and GPU alone, so a CUDA graph may replay it
for any lengths. With several parts a second kernel adds them in fixed order: the same input gives the same bits.

This file holds the launcher of both caches and the kernel of the 16-bit one; `paged_decode_int8` holds the other.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.decode_parts import (
    NO_WINDOW,
    Parts,
    Plan,
    empty_parts,
    launch_merge,
    plan_16bit,
    plan_int8,
    prefetch,
)
from quantlab_kernels.kv_cache import KVCache, Pages, check_heads
from quantlab_kernels.launch import has_pdl, require
from quantlab_kernels.paged_decode_int8 import HEADS_INT8, launch_int8
from quantlab_kernels.rows import empty_rows

# More query heads than this on a KV head take several programs, each with its own pass over K and V.
HEADS_16BIT = 64


@triton.jit(do_not_specialize=["parts", "table_stride", "window"])
def _decode_kernel(
    q, k_cache, v_cache, blocks, lengths, out, part_output, part_weight, scale, q_stride, table_stride, parts, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
    SETTLED: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not SETTLED:
            tl.extra.cuda.gdc_wait()
    part, sequence = tl.program_id(0), tl.program_id(2)
    head, tile = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    n = tl.load(lengths + sequence, cache_modifier=".cg")
    first = tl.maximum(n - window, 0)
    span = tl.cdiv(tl.cdiv(n - first, parts), TOKENS) * TOKENS
    lo = first + part * span
    hi = tl.minimum(lo + span, n)
    row, channel, token = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TOKENS)
    row_ok, inside = row < GROUP, channel < HEAD_DIM
    if SETTLED:
        t = tl.maximum(tl.minimum(lo + token, n - 1), 0)
        block = tl.load(blocks + sequence * table_stride + t // BLOCK_SIZE, n > 0, 0, cache_modifier=".cg").to(tl.int64)
        line = ((block * KV_HEADS + head) * BLOCK_SIZE + t % BLOCK_SIZE) * HEAD_DIM
        line = line[:, None] + tl.minimum(tl.arange(0, DIM // 64) * 64, HEAD_DIM - 1)[None, :]
        prefetch(k_cache + line)
        prefetch(v_cache + line)
        tl.extra.cuda.gdc_wait()
    q_at = q + sequence.to(tl.int64) * q_stride + (head * GROUP + row)[:, None] * HEAD_DIM + channel[None, :]
    queries = tl.load(q_at, row_ok[:, None] & inside[None, :], 0.0)
    most = tl.full((ROWS,), -1e30, tl.float32)  # finite: a step of scores that are all -inf has weights 0, not NaN
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for start in tl.range(lo, hi, TOKENS, num_stages=STAGES):
        # Past the end: a token that exists, masked below (a slot never written may hold NaN, and 0 * NaN is NaN).
        t = tl.minimum(start + token, n - 1)
        block = tl.load(blocks + sequence * table_stride + t // BLOCK_SIZE).to(tl.int64)
        at = (((block * KV_HEADS + head) * BLOCK_SIZE + t % BLOCK_SIZE) * HEAD_DIM)[:, None] + channel[None, :]
        if HEAD_DIM == DIM:
            k = tl.load(k_cache + at, eviction_policy="evict_first")
        else:
            k = tl.load(k_cache + at, inside[None, :], 0.0, eviction_policy="evict_first")
        scores = tl.where((start + token < hi)[None, :], tl.dot(queries, tl.trans(k)) * scale, -float("inf"))
        larger = tl.maximum(most, tl.max(scores, 1))
        p = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(most - larger)
        total = total * shrink + tl.sum(p, 1)
        if HEAD_DIM == DIM:
            v = tl.load(v_cache + at, eviction_policy="evict_first")
        else:
            v = tl.load(v_cache + at, inside[None, :], 0.0, eviction_policy="evict_first")
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        most = larger
    some = total > 0
    acc *= tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    pair = sequence.to(tl.int64) * KV_HEADS + head
    ok = row_ok[:, None] & inside[None, :]
    if SPLIT:
        base = (pair * parts + part) * GROUP + row
        tl.store(part_output + base[:, None] * HEAD_DIM + channel[None, :], acc, ok)
        tl.store(part_weight + base, tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), -float("inf")), row_ok)
    else:
        to = out + (pair * GROUP + row)[:, None] * HEAD_DIM + channel[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), ok)


def paged_decode(
    q: Tensor,
    cache: KVCache,
    pages: Pages,
    scale: float | None = None,
    window: int | None = None,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """Attention of each sequence's newest token over the tokens it has in the cache, itself included.

    q: [S, H, D] fp16 or bf16 (rows may have any stride); scale: of the scores, D^-1/2 unless given; window: how many
    tokens back a query sees; out: [S, H, D] contiguous, made if not given; plan: a grid other than the usual one.
    Returns out in q's dtype; a sequence of length 0 gives zeros. Raises ValueError.
    """
    sequences, heads = _check(q, cache, pages, window)
    out = empty_rows(len(q), q.shape[1] * q.shape[2], q.dtype, q.device).view(q.shape) if out is None else out
    require(out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), "out must be contiguous, as q else")
    if sequences == 0:
        return out
    if plan is None:
        plan = choose_plan(q, cache, sequences, pages.max_length, window)
    pairs, group = sequences * cache.kv_heads, heads // cache.kv_heads
    parts = empty_parts(pairs, plan.parts, group, cache.head_dim, q) if plan.parts > 1 else Parts(out, out)
    log2_scale = (cache.head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    launch = launch_int8 if cache.is_int8 else _launch_16bit
    launch(q, cache, pages, (log2_scale, window or NO_WINDOW), plan, parts, out)
    if plan.parts > 1:
        launch_merge(parts, out)
    return out


def choose_plan(q: Tensor, cache: KVCache, sequences: int, tokens: int, window: int | None) -> Plan:
    """The grid for a step of `sequences` that have `tokens` each at most. q: [T, H, D] of the same model."""
    tiles = triton.cdiv(q.shape[1] // cache.kv_heads, HEADS_INT8 if cache.is_int8 else HEADS_16BIT)
    choose = plan_int8 if cache.is_int8 else plan_16bit
    reach = min(tokens, window or NO_WINDOW)
    return choose(sequences * cache.kv_heads * tiles, reach, cache.head_dim, _processors(q))


def _launch_16bit(
    q: Tensor, cache: KVCache, pages: Pages, scores: tuple[float, int], plan: Plan, parts: Parts, out: Tensor
) -> None:
    sequences, heads, head_dim = q.shape
    group = heads // cache.kv_heads
    rows = max(16, min(triton.next_power_of_2(group), HEADS_16BIT))
    _decode_kernel[(plan.parts, cache.kv_heads * triton.cdiv(group, rows), sequences)](
        q, cache.k, cache.v, pages.blocks, pages.lengths, out, parts.output, parts.weight, scores[0],
        q.stride(0), pages.blocks.shape[1], plan.parts, scores[1],
        KV_HEADS=cache.kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim), ROWS=rows,
        TOKENS=plan.tokens, BLOCK_SIZE=cache.block_size, STAGES=plan.stages, SPLIT=plan.parts > 1,
        PDL=has_pdl(q), SETTLED=plan.early and pages.settled and has_pdl(q), num_warps=plan.warps,
        num_stages=plan.stages, launch_pdl=plan.early and has_pdl(q),
    )  # fmt: skip


def _check(q: Tensor, cache: KVCache, pages: Pages, window: int | None) -> tuple[int, int]:
    """Sequences and query heads."""
    require(q.dim() == 3 and q.shape[1] % cache.kv_heads == 0, f"q must be [S, n * {cache.kv_heads}, D]")
    check_heads("q", q, q.shape[1], cache)
    require(pages.lengths.shape[0] == q.shape[0], "q must have one row a sequence")
    require(pages.lengths.device == q.device, f"lengths are on {pages.lengths.device}, q on {q.device}")
    require(window is None or window > 0, "a window holds one token at least")
    return q.shape[0], q.shape[1]


def _processors(q: Tensor) -> int:
    """Streaming multiprocessors; the interpreter stands for a small GPU."""
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
