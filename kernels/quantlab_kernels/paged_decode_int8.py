"""The decode kernel of the INT8 cache: integer tensor cores on codes that are never converted.

The warps of a program are the batch index of 3-D products: each walks its own steps of 32 tokens with its own running
maximum, sum and output, so the loop has no barrier and no shared memory. K and V come by 16-byte loads straight into
the registers of mma.sync operands (`kv_cache` lays V out for that), one step ahead.

A query row is rounded to 15 bits against its largest channel and split into two int8 planes, code = 256 * high + low,
that fill operand rows which the few query heads of a group leave empty; so are the softmax weights times the scale of
V. No 8-bit rounding is added to that of the cache. Knows nothing about how the parts of a sequence are added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.decode_parts import NO_WINDOW, Parts, Plan, prefetch
from quantlab_kernels.kv_cache import KVCache, Pages
from quantlab_kernels.launch import has_pdl

# Query heads of a KV head that one program serves: two planes of 8 fill the 16 rows of an mma.
HEADS_INT8 = 8
# 15 bits: 127 * 256, so that the high plane stays within int8.
PLANES = tl.constexpr(32512.0)

# The inline assembly below mixes the four elements that a thread holds together, which is right only while the four
# words of a lane are neighbours in its registers. Checked in the IR of these releases; others take the plain way.
ASSEMBLY_RELEASES = ("3.6", "3.9")
_SPLIT = tl.constexpr("mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;")
_PLANE = tl.constexpr("{ .reg .b32 a, b; prmt.b32 a, $1, $2, $5; prmt.b32 b, $3, $4, $5; prmt.b32 $0, a, b, 0x5410; }")


@triton.jit
def _bytes(words, ASSEMBLY: tl.constexpr):
    """int32 [lane, warp, tile, slot, 4] -> its bytes [lane, warp, tile, slot, 16]."""
    if ASSEMBLY:
        # Moves nothing: a word is renamed to the four int8 that a thread holds, output j being word j.
        a, b, c, d = tl.inline_asm_elementwise(
            _SPLIT, "=r,=r,=r,=r,r,r,r,r", [words], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
        y = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 1, 2, 3, 5, 6, 4))
    else:
        shift = tl.arange(0, 4) * 8
        y = (words[:, :, :, :, :, None] >> shift[None, None, None, None, None, :]).to(tl.int8)
    return tl.reshape(y, (words.shape[0], words.shape[1], words.shape[2], words.shape[3], 16))


@triton.jit
def _load(
    k_cache, v_cache, scales, blocks, start, last, head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, WARPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """K and V of one step as int32 [lane, warp, tile, slot, 4 words], scales as [lane, warp, tile, 4 tokens]."""
    SLOTS: tl.constexpr = DIM // 32
    # Past the end: a tile that exists, masked later. A layer's tiles (2 KB and up) are counted in 32 bits.
    tile = tl.minimum(start // 16 + tl.arange(0, WARPS)[:, None] * 2 + tl.arange(0, 2)[None, :], last)
    block = tl.load(blocks + tile // (BLOCK_SIZE // 16))
    tile = (block * KV_HEADS + head) * (BLOCK_SIZE // 16) + tile % (BLOCK_SIZE // 16)
    lane, slot, word = tl.arange(0, 32)[:, None], tl.arange(0, SLOTS)[None, :], tl.arange(0, 4)
    # K: lane (g, t) = (lane / 4, lane % 4) holds 16 channels of a token in column g of an mma; V: a tile of 4 x 4.
    token = (lane // 8) * 4 + (slot // (DIM // 64)) * 2 + (lane // 4) % 2
    channel = slot % (DIM // 64) * 64 + lane % 4 * 16
    k_at = token * (HEAD_DIM // 4) + channel // 4
    v_at = slot * 128 + lane * 4
    base = (tile.to(tl.int64) * (4 * HEAD_DIM))[None, :, :, None, None] + word[None, None, None, None, :]
    k_from, v_from = k_cache + (base + k_at[:, None, None, :, None]), v_cache + (base + v_at[:, None, None, :, None])
    if HEAD_DIM == DIM:
        k = tl.load(k_from, eviction_policy="evict_first")
        v = tl.load(v_from, eviction_policy="evict_first")
    else:
        k = tl.load(k_from, (channel < HEAD_DIM)[:, None, None, :, None], 0, eviction_policy="evict_first")
        v = tl.load(v_from, (v_at < 4 * HEAD_DIM)[:, None, None, :, None], 0, eviction_policy="evict_first")
    at = (tile * 32)[None, :, :, None] + (tl.arange(0, 32) % 4 * 4)[:, None, None, None] + word[None, None, None, :]
    return k, v, tl.load(scales + at), tl.load(scales + at + 16)


@triton.jit
def _log2(x, ASSEMBLY: tl.constexpr):
    if ASSEMBLY:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _plane(x, high, ASSEMBLY: tl.constexpr):
    """The high (1) or low (0) int8 plane of an integer held in the low mantissa bits of a float."""
    if ASSEMBLY:
        which = 0x0040 + 0x0011 * high
        y = tl.inline_asm_elementwise(_PLANE, "=r,r,r,r,r,r,r,r,r", [x, which], tl.int8, is_pure=True, pack=4)
    else:
        y = (x.to(tl.int32, bitcast=True) >> (8 * high)).to(tl.int8)
    return y


@triton.jit
def _weights(x, high, WARPS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Softmax weights in 0..1, [warp, 8, 32], as int8 operand [warp, 32, 8] of the product with V, the tokens in its
    order."""
    # 1.5 * 2^23 puts the integer into the low bits of the float; 128 rounds the high plane where it is taken.
    x = x * PLANES + (12582912.0 + 128.0 * high)
    codes = _plane(x, high + tl.zeros_like(x).to(tl.int32), ASSEMBLY)
    codes = tl.permute(tl.reshape(codes, (WARPS, 8, 1, 2, 4, 4)), (0, 2, 4, 3, 5, 1))
    return tl.reshape(codes, (WARPS, 32, 8))


@triton.jit
def _step(
    most, total, acc, queries, q_scale, k, v, k_scale, v_scale, start, lowest, hi,
    DIM: tl.constexpr, WARPS: tl.constexpr, HEADS: tl.constexpr, WINDOW: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One step of 32 tokens a warp: scores, softmax, output. Rows are heads (8, or 4 twice), as are acc's columns."""
    HALVES: tl.constexpr = DIM // 64
    # lane = (g, t); a slot = (token of two, 64 channels); 16 bytes = (i, b): the order of the product's columns.
    k = tl.reshape(_bytes(k, ASSEMBLY), (8, 4, WARPS, 2, 2, HALVES, 2, 8))
    k = tl.reshape(tl.permute(k, (2, 5, 6, 1, 7, 3, 4, 0)), (WARPS, DIM, 32))
    scores = tl.dot(queries, k)  # [warp, 2 planes x 8 rows, 32]
    scores = tl.permute(tl.reshape(scores, (WARPS, 2, 8, 2, 2, 4, 2)), (0, 2, 3, 5, 4, 6, 1))
    high, low = tl.split(tl.reshape(scores, (WARPS, 8, 32, 2)))  # tokens in order from here on
    scores = (high * 256 + low).to(tl.float32)
    k_scale = tl.reshape(tl.permute(tl.reshape(k_scale, (8, 4, WARPS, 2, 4)), (2, 0, 3, 1, 4)), (WARPS, 8, 32))
    v_scale = tl.reshape(tl.permute(tl.reshape(v_scale, (8, 4, WARPS, 2, 4)), (2, 0, 3, 1, 4)), (WARPS, 8, 32))
    token = start + tl.arange(0, WARPS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    ok = (token < hi)[:, None, :]
    if WINDOW:
        ok &= (token >= lowest)[:, None, :]
    scores = tl.where(ok, scores * k_scale * q_scale[:, :, None], -2e30)
    v_scale = tl.where(ok, v_scale, 1.0)  # slots never written may hold anything
    # The reference is the maximum of score + log2 of V's scale, so that weight * scale <= 1; 15 bits against the
    # maximum of this step, not of all steps.
    here = tl.maximum(tl.max(scores + _log2(v_scale, ASSEMBLY), 2), -1e30)
    larger = tl.maximum(most, here)
    shrink, grow = tl.exp2(most - larger), tl.exp2(here - larger)
    p = tl.exp2(scores - here[:, :, None])
    total = total * shrink + tl.sum(p, 2) * grow
    x = p * v_scale
    v = tl.reshape(_bytes(v, ASSEMBLY), (8, 4, WARPS, 1, 2, DIM // 32, 4, 4))
    v = tl.reshape(tl.permute(v, (2, 5, 6, 0, 3, 1, 4, 7)), (WARPS, DIM, 32))
    if HEADS == 4:  # rows 0-3 give the high plane, rows 4-7, the same heads, the low one
        plane = 1 - tl.arange(0, 8) // 4
        sums = tl.dot(v, _weights(x, plane[None, :, None], WARPS, ASSEMBLY)).to(tl.float32)
    else:
        one = tl.full((1, 8, 1), 1, tl.int32)
        sums = tl.dot(v, _weights(x, one, WARPS, ASSEMBLY)) * 256 + tl.dot(v, _weights(x, one - 1, WARPS, ASSEMBLY))
        sums = sums.to(tl.float32)
    acc = acc * shrink[:, None, :] + sums * grow[:, None, :]
    return larger, total, acc


@triton.jit
def _load_queries(
    q, rows, scale, WHOLE: tl.constexpr, DIM: tl.constexpr, HEAD_DIM: tl.constexpr, WARPS: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Queries as int8 [warp, 16, D] (rows: plane x 8 heads, channels in K's order) and scales [warp, 8] fp32."""
    c, r = tl.arange(0, DIM), tl.arange(0, 16)
    channel = c // 64 * 64 + c // 8 % 4 * 16 + c // 32 % 2 * 8 + c % 8
    row = tl.arange(0, 8) % HEADS
    x_at, y_at = (r % HEADS)[:, None] * HEAD_DIM + channel[None, :], row[:, None] * HEAD_DIM + c[None, :]
    if WHOLE:
        x, y = tl.load(q + x_at).to(tl.float32), tl.load(q + y_at).to(tl.float32)
    else:
        x = tl.load(q + x_at, ((r % HEADS) < rows)[:, None] & (channel < HEAD_DIM)[None, :], 0.0).to(tl.float32)
        y = tl.load(q + y_at, (row < rows)[:, None] & (c < HEAD_DIM)[None, :], 0.0).to(tl.float32)
    x = x * (1.0 / tl.maximum(tl.max(tl.abs(x), 1), 1e-20) * PLANES)[:, None]
    x = tl.floor(x + 0.5).to(tl.int32)
    high = (x + 128) >> 8
    codes = tl.where((r // 8)[:, None] == 0, high, x - high * 256).to(tl.int8)
    largest = tl.maximum(tl.max(tl.abs(y), 1), 1e-20)
    q_scale = tl.broadcast_to((largest * scale / PLANES)[None, :], (WARPS, 8))
    return tl.broadcast_to(codes[None, :, :], (WARPS, 16, DIM)), q_scale


@triton.jit(do_not_specialize=["parts", "table_stride", "window"])
def _decode_int8_kernel(
    q, k_cache, v_cache, scales, blocks, lengths, out, part_output, part_weight, scale, q_stride, table_stride, parts,
    window, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, WARPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr,
    WINDOW: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not SETTLED:
            tl.extra.cuda.gdc_wait()
    part, sequence = tl.program_id(0), tl.program_id(2)
    head, group_at = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS * HEADS
    n = tl.load(lengths + sequence, cache_modifier=".cg")
    lowest = tl.maximum(n - window, 0)
    first = lowest // 16 * 16  # tiles are read whole
    STEP: tl.constexpr = WARPS * 32
    span = tl.cdiv(tl.cdiv(n - first, parts), STEP) * STEP
    lo = first + part * span
    hi = tl.minimum(lo + span, n)
    last = tl.maximum((n + 15) // 16 - 1, 0)
    # The table of an empty sequence may hold anything; its length, 0, is the number of a block that exists.
    table = tl.where(n > 0, blocks + sequence * table_stride, lengths + sequence)
    q_from = q + sequence.to(tl.int64) * q_stride + (head * GROUP + group_at) * HEAD_DIM
    if SETTLED:
        tile = tl.minimum(lo // 16 + tl.arange(0, 2 * WARPS), last)
        block = tl.load(table + tile // (BLOCK_SIZE // 16), cache_modifier=".cg")
        tile = ((block * KV_HEADS + head) * (BLOCK_SIZE // 16) + tile % (BLOCK_SIZE // 16)).to(tl.int64)
        line = (tile * (4 * HEAD_DIM))[:, None] + tl.minimum(tl.arange(0, DIM // 8) * 32, 4 * HEAD_DIM - 1)[None, :]
        prefetch(k_cache + line)
        prefetch(v_cache + line)
        prefetch(scales + tile * 32)
        tl.extra.cuda.gdc_wait()
    if AHEAD:
        k, v, k_scale, v_scale = _load(
            k_cache, v_cache, scales, table, lo, last, head, KV_HEADS, HEAD_DIM, DIM, WARPS, BLOCK_SIZE
        )
    WHOLE: tl.constexpr = GROUP % HEADS == 0 and HEAD_DIM == DIM
    queries, q_scale = _load_queries(q_from, GROUP - group_at, scale, WHOLE, DIM, HEAD_DIM, WARPS, HEADS)
    most, total = tl.full((WARPS, 8), -1e30, tl.float32), tl.zeros((WARPS, 8), tl.float32)
    acc = tl.zeros((WARPS, DIM, 8), tl.float32)
    if AHEAD:
        for start in tl.range(lo, hi, STEP, num_stages=1):
            k_next, v_next, k_scale_next, v_scale_next = _load(
                k_cache, v_cache, scales, table, start + STEP, last, head, KV_HEADS, HEAD_DIM, DIM, WARPS, BLOCK_SIZE
            )
            most, total, acc = _step(
                most, total, acc, queries, q_scale, k, v, k_scale, v_scale, start, lowest, hi,
                DIM, WARPS, HEADS, WINDOW, ASSEMBLY,
            )  # fmt: skip
            k, v, k_scale, v_scale = k_next, v_next, k_scale_next, v_scale_next
    else:
        for start in tl.range(lo, hi, STEP, num_stages=1):
            k, v, k_scale, v_scale = _load(
                k_cache, v_cache, scales, table, start, last, head, KV_HEADS, HEAD_DIM, DIM, WARPS, BLOCK_SIZE
            )
            most, total, acc = _step(
                most, total, acc, queries, q_scale, k, v, k_scale, v_scale, start, lowest, hi,
                DIM, WARPS, HEADS, WINDOW, ASSEMBLY,
            )  # fmt: skip
    # Warps into one; with 4 heads a row, the two planes too.
    row, out_row = tl.arange(0, 8), tl.arange(0, HEADS)
    top = tl.max(most, 0)
    weight = tl.exp2(most - top[None, :])
    sums = tl.sum(total * weight, 0)
    some = sums > 0
    plane = tl.where(row < 4, 256.0, 1.0) if HEADS == 4 else tl.full((8,), 1.0, tl.float32)
    weight = weight * (plane / (tl.where(some, sums, 1.0) * PLANES))[None, :]
    y = tl.sum(acc * weight[:, None, :], 0)
    y = tl.sum(tl.reshape(y, (DIM, 8 // HEADS, HEADS)), 1)
    m = tl.arange(0, DIM)
    channel = m // 32 * 32 + m % 8 * 4 + m // 8 % 4  # of output row m: V's tiles hold 4 channels each
    ok = (group_at + out_row < GROUP)[None, :] & (channel < HEAD_DIM)[:, None]
    pair = sequence.to(tl.int64) * KV_HEADS + head
    if SPLIT:
        base = (pair * parts + part) * GROUP + group_at
        tl.store(part_output + (base + out_row)[None, :] * HEAD_DIM + channel[:, None], y, ok)
        log = tl.where(some, top + tl.log2(tl.where(some, sums, 1.0)), -float("inf"))
        tl.store(part_weight + base + row, log, (row < HEADS) & (group_at + row < GROUP))
    else:
        to = out + (pair * GROUP + group_at + out_row)[None, :] * HEAD_DIM + channel[:, None]
        tl.store(to, y.to(out.dtype.element_ty), ok)


def launch_int8(
    q: Tensor, cache: KVCache, pages: Pages, scores: tuple[float, int], plan: Plan, parts: Parts, out: Tensor
) -> None:
    """Launch the kernel; every argument was checked by `paged_decode`. scores: log2(e) * scale, and the window."""
    sequences, heads, head_dim = q.shape
    group = heads // cache.kv_heads
    rows = 4 if group <= 4 else HEADS_INT8
    _decode_int8_kernel[(plan.parts, cache.kv_heads * triton.cdiv(group, rows), sequences)](
        q, cache.k.view(torch.int32), cache.v.view(torch.int32), cache.scales, pages.blocks, pages.lengths, out,
        parts.output, parts.weight, scores[0], q.stride(0), pages.blocks.shape[1], plan.parts, scores[1],
        KV_HEADS=cache.kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim), HEADS=rows,
        WARPS=plan.warps, BLOCK_SIZE=cache.block_size, SPLIT=plan.parts > 1, AHEAD=head_dim <= 128,
        WINDOW=scores[1] < NO_WINDOW, ASSEMBLY=_has_assembly(q), PDL=has_pdl(q),
        SETTLED=plan.early and pages.settled and has_pdl(q),
        num_warps=plan.warps, num_stages=1, launch_pdl=plan.early and has_pdl(q),
    )  # fmt: skip


def _has_assembly(q: Tensor) -> bool:
    """Whether the inline assembly may be used: on a GPU, in a release of Triton whose register order was checked."""
    return q.is_cuda and ".".join(triton.__version__.split(".")[:2]) in ASSEMBLY_RELEASES
