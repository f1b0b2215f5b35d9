"""W4A16 for few tokens: out[m, n] = sum_k x[m, k] W[n, k], bound by the bytes of W. NVIDIA, from sm_80.

out^T = W x^T on mma.sync, W as operand A. The words of w4a16_layout are that operand's fragments, so a weight goes from
memory to the tensor core through registers alone: no shared memory and no barrier in the loop. The WARPS warps of a
program share MT tiles of 16 rows and divide K, 128 columns at a time, warp i taking blocks i, i + WARPS, ...; that is a
3-D dot whose batch index is the warp. The next step's words are on their way while this one's are multiplied.

SPLIT programs divide the K of a tile. Each writes its sum in float32, and the one that arrives last adds all of them in
their fixed order: nobody waits for anybody, and the bits do not depend on who was last.

Index tensors are spelled so that Triton's coalesced layout of a load is the fragment itself: the fastest index is what
a thread holds, then 32 lanes, then warps, then registers again. Any other spelling costs a trip through shared memory.
"""

import triton
import triton.language as tl

from quantlab_kernels.w4a16_unpack import scale_terms, unpack, unpack_plain


@triton.jit
def load_words(words, block, first, step, half: tl.constexpr, C, WARPS: tl.constexpr, MT: tl.constexpr, limit):
    """The words of 16 MT rows by 64 columns for each warp: [WARPS, 16 MT, 16] int16."""
    i = tl.arange(0, MT * WARPS * 256)
    group = step * WARPS + (i // 256) % WARPS
    at = words + ((block * C + 2 * group + half) * 4 + first * MT + i // (256 * WARPS)).to(tl.int64) * 256 + i % 256
    if limit is None:
        p = tl.load(at, eviction_policy="evict_first")
    else:
        p = tl.load(at, mask=group < limit, other=0, eviction_policy="evict_first")
    p = tl.permute(tl.reshape(p, (MT, WARPS, 8, 4, 2, 2, 2)), (1, 0, 5, 2, 4, 3, 6))
    return tl.reshape(p, (WARPS, MT * 16, 16))


@triton.jit
def load_scales(scales, block, first, step, part: tl.constexpr, C, WARPS: tl.constexpr, MT: tl.constexpr,
                PARTS: tl.constexpr, limit):  # fmt: skip
    """What is stored of part `part` of PARTS of each warp's 128 columns, a copy for each of 4 lanes: [WARPS*64*MT]."""
    i = tl.arange(0, WARPS * 64 * MT)
    group = step * WARPS + i // (64 * MT)
    row = (i // (8 * MT)) % 8 * 8 + first * (2 * MT) + i % (2 * MT)
    at = scales + ((block * (C // 2) + group) * PARTS + part) * 64 + row
    return tl.load(at) if limit is None else tl.load(at, mask=group < limit, other=0)


@triton.jit
def load_all_scales(scales, block, first, step, C, WARPS: tl.constexpr, MT: tl.constexpr, PARTS: tl.constexpr, limit):
    """`load_scales` of every part of the 128 columns, as a tuple."""
    values = ()
    for i in tl.static_range(PARTS):
        s = load_scales(scales, block, first, step, i, C, WARPS, MT, PARTS, limit)
        values = values + (s,)  # type: ignore[assignment]
    return values


@triton.jit
def spread(s, WARPS: tl.constexpr, MT: tl.constexpr):
    """[WARPS*64*MT] of `load_scales` to [WARPS, 16 MT, 16], beside the words."""
    s = tl.permute(tl.reshape(s, (WARPS, 8, 4, MT, 2)), (0, 3, 4, 1, 2))[:, :, :, :, None, :, None]
    return tl.reshape(tl.broadcast_to(s, (WARPS, MT, 2, 8, 2, 4, 2)), (WARPS, MT * 16, 16))


@triton.jit
def load_x(x, m0, M, K, step, plane: tl.constexpr, WARPS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
           WHOLE: tl.constexpr):  # fmt: skip
    """Columns 16 plane to 16 plane + 15 of each warp's 128, transposed: [WARPS, 16, BM]."""
    i = tl.arange(0, 8 * BM * WARPS)
    m = m0 + i // (64 * WARPS) * 8 + (i // 4) % 8
    k = (step * WARPS + (i // 32) % WARPS) * 128 + 16 * plane + (i // (32 * WARPS)) % 2 * 8 + i % 4 * 2
    # Two axes on purpose: along one, this load and that of the words would be given equal shares of a thread.
    k = k[:, None] + tl.arange(0, 2)[None, :]
    keep = (m < M)[:, None] if WHOLE else (m < M)[:, None] & (k < K)
    v = tl.load(x + m.to(tl.int64)[:, None] * K + k, mask=keep, other=0.0).to(D)
    v = tl.permute(tl.reshape(v, (BM // 8, 2, WARPS, 8, 4, 2)), (2, 1, 4, 5, 0, 3))
    return tl.reshape(v, (WARPS, 16, BM))


@triton.jit
def multiply(acc, p, quarter: tl.constexpr, scale, zero, x, m0, M, K, step, WARPS: tl.constexpr, MT: tl.constexpr,
             BM: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr, D: tl.constexpr,
             WHOLE: tl.constexpr):  # fmt: skip
    """acc + quarter `quarter` of each warp's 128 columns. p: [WARPS, 16 MT, 16] words of the half that has it."""
    pair: tl.constexpr = quarter % 2
    if ASM:
        s0, s1, t0, t1 = scale_terms(scale, zero, ZEROS)
        a0, a1 = unpack(p, pair, spread(s0, WARPS, MT), spread(s1, WARPS, MT), spread(t0, WARPS, MT),
                        spread(t1, WARPS, MT), ZEROS)  # fmt: skip
    else:
        s = spread(scale, WARPS, MT)
        z = spread(zero, WARPS, MT)
        a0 = unpack_plain(p, 2 * pair, s, z, ZEROS, 4, D)
        a1 = unpack_plain(p, 2 * pair + 1, s, z, ZEROS, 4, D)
    acc = tl.dot(a0, load_x(x, m0, M, K, step, 2 * quarter, WARPS, BM, D, WHOLE), acc)
    return tl.dot(a1, load_x(x, m0, M, K, step, 2 * quarter + 1, WARPS, BM, D, WHOLE), acc)


@triton.jit
def finish(r, out, bias, partials, counters, tile, part, scale, m0, M, N, ROWS: tl.constexpr, BM: tl.constexpr,
           SPLIT: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Store r [ROWS, BM], or what the SPLIT programs of this tile have summed, if this one is the last of them."""
    n = tile * ROWS + tl.arange(0, ROWS)
    m = m0 + tl.arange(0, BM)
    keep = (n < N)[:, None] & (m < M)[None, :]
    last = True
    if SPLIT > 1:
        meeting = tile * tl.num_programs(1) + tl.program_id(1)
        at = partials + meeting * (SPLIT * ROWS * BM) + tl.arange(0, BM)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        tl.store(at + part * (ROWS * BM), r, mask=(m < M)[None, :])
        tl.debug_barrier()
        last = tl.atomic_add(counters + meeting, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            r = tl.zeros((ROWS, BM), tl.float32)
            for j in tl.static_range(SPLIT):
                r += tl.load(at + j * (ROWS * BM), mask=(m < M)[None, :], other=0.0, cache_modifier=".cg")
            tl.store(counters + meeting, 0)
    if last:
        r *= scale
        if BIAS:
            r += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], r.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M", "C", "scale"])
def w4a16_decode_kernel(x, words, scales, zeros, bias, out, partials, counters, scale, M, N, K, C,
                        WARPS: tl.constexpr, MT: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr,
                        SPLIT: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
                        ASM: tl.constexpr, PDL: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Grid (tiles of 16 MT rows * SPLIT, tiles of BM tokens). WHOLE: 128 WARPS divides K, so no load needs a mask."""
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    m0 = tl.program_id(1) * BM
    block = tile // (4 // MT)
    first = tile % (4 // MT)  # in tiles of MT: a product with a constant is what tells Triton the alignment
    steps = (C // 2 + WARPS - 1) // WARPS
    step = part * steps // SPLIT
    end = (part + 1) * steps // SPLIT
    limit = tl.minimum(end * WARPS, C // 2)  # in blocks of 128 columns
    first_limit = None if WHOLE else limit
    p0 = load_words(words, block, first, step, 0, C, WARPS, MT, first_limit)
    p1 = load_words(words, block, first, step, 1, C, WARPS, MT, first_limit)
    sc = load_all_scales(scales, block, first, step, C, WARPS, MT, PARTS, first_limit)
    ze = load_all_scales(zeros, block, first, step, C, WARPS, MT, PARTS, first_limit) if ZEROS else sc
    if PDL:  # weights do not depend on the kernel before this one; everything after this line may
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((WARPS, MT * 16, BM), tl.float32)
    while step < end:
        q0 = load_words(words, block, first, step + 1, 0, C, WARPS, MT, limit)
        q1 = load_words(words, block, first, step + 1, 1, C, WARPS, MT, limit)
        next_sc = load_all_scales(scales, block, first, step + 1, C, WARPS, MT, PARTS, limit)
        next_ze = load_all_scales(zeros, block, first, step + 1, C, WARPS, MT, PARTS, limit) if ZEROS else next_sc
        for i in tl.static_range(4):
            acc = multiply(acc, p0 if i < 2 else p1, i, sc[i * PARTS // 4], ze[i * PARTS // 4], x, m0, M, K, step,
                           WARPS, MT, BM, ZEROS, ASM, D, WHOLE)  # fmt: skip
        p0, p1, sc, ze = q0, q1, next_sc, next_ze
        step += 1
    finish(tl.sum(acc, axis=0), out, bias, partials, counters, tile, part, scale, m0, M, N, MT * 16, BM, SPLIT, BIAS)
