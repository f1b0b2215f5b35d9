"""W4A16 for many tokens on Hopper (sm_90a), in Gluon: out[m, n] = sum_k x[m, k] W[n, k], on WGMMA.

out^T = W x^T with W as operand A from registers. One producer warp fills a ring of STAGES stages by TMA (words of BN
rows, x of BM tokens, 64 KH columns each); WARPS consumer warps unpack words to weights in registers (w4a16_unpack) and
issue asynchronous WGMMAs, one batch of 64 columns in flight while the next is unpacked. Scales are in the weights, so
sums run over all of K without being touched.

A program makes a tile of BN = 16 WARPS R rows by BM (+ BM2) tokens. R = 2: two row blocks share x. BM2 > 0: two widths
of WGMMA share the unpacked weights, for token counts between powers of two. SPLIT programs divide K: each writes its
sum in float32, the one that arrives last adds all in their fixed order, and nobody waits for anybody.

What ptxas demands, and the offline tests check in the machine code:
- accumulators are defined by WGMMA alone on every path (`assume(n > 0)`), else all WGMMAs are serialized (C7515);
- consumers are the default partition: as workers they are serialized (C7512);
- at least two batches an iteration: with one, the operand registers are overwritten in flight, and results are wrong.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from quantlab_kernels.w4a16_unpack import assembly

# Gluon renames its functions between releases: the left names are those of Triton 3.9, the right ones of 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Tiles of tokens that are handled together, row block by row block, while the x of all of them is in the L2 cache.
TOKEN_TILES = gl.constexpr(8)


@gluon.jit
def wait_for_previous_kernel(START: gl.constexpr):
    """START: let the next kernel start early. Otherwise: until the kernel before this one is done."""
    text: gl.constexpr = "griddepcontrol.launch_dependents; // $0" if START else "griddepcontrol.wait; // $0"
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def minus_8(scale):
    """-8 * scale as a weight has it; see w4a16_unpack.minus_8."""
    if scale.dtype == gl.bfloat16:
        bits = scale.to(gl.int16, bitcast=True)
        product = gl.where((bits & 0x7FFF) > (130 << 7), (bits - (130 << 7)) ^ -0x8000, 0).to(gl.int16)
        term = product.to(gl.bfloat16, bitcast=True)
    else:
        term = scale * -(2.0**-21)
    return term


@gluon.jit
def scale_terms(s, z, MMA: gl.constexpr, WARPS: gl.constexpr, ZEROS: gl.constexpr):
    """The four operands of unpacking, [16 WARPS, 1] each. s, z: [16 WARPS] as stored, row (w, r, b1)."""
    A: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, MMA, 2))
    s = gl.reshape(gl.permute(gl.reshape(s, (WARPS, 8, 2)), (0, 2, 1)), (16 * WARPS,))
    s0 = gl.expand_dims(gl.convert_layout(s, A, assert_trivial=True), 1)
    s1 = s0 * 0.0625
    if ZEROS:
        z = gl.reshape(gl.permute(gl.reshape(z, (WARPS, 8, 2)), (0, 2, 1)), (16 * WARPS,))
        z = gl.expand_dims(gl.convert_layout(z, A, assert_trivial=True), 1)
        t0 = z.to(s0.dtype, bitcast=True)
        t1 = ((z << 4) | -32768).to(gl.int16).to(s0.dtype, bitcast=True)
    else:
        t0 = minus_8(s0)
        t1 = t0
    return s0, s1, t0, t1


@gluon.jit
def unpack_pair(q, pair: gl.constexpr, terms, ZEROS: gl.constexpr):
    """Nibbles 2 pair and 2 pair + 1 of words q [16 WARPS, 16] as weights."""
    if terms[0].dtype == gl.bfloat16:
        a = gl.inline_asm_elementwise(assembly(True, pair, ZEROS), "=r,=r,r,r,r,r,r",
                                      [q, terms[0], terms[1], terms[2], terms[3]],
                                      dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2)  # fmt: skip
    else:
        a = gl.inline_asm_elementwise(assembly(False, pair, ZEROS), "=r,=r,r,r,r,r,r",
                                      [q, terms[0], terms[1], terms[2], terms[3]],
                                      dtype=(gl.float16, gl.float16), is_pure=True, pack=2)  # fmt: skip
    return a


@gluon.jit
def unpack(p, low, high, A: gl.constexpr, WARPS: gl.constexpr, ZEROS: gl.constexpr):
    """Words [4 WARPS, 64] as stored to operand A [16 WARPS, 64]. low, high: terms of columns 0-31 and 32-63."""
    q = gl.reshape(gl.permute(gl.reshape(p, (WARPS, 8, 4, 2, 2, 2)), (0, 4, 1, 3, 2, 5)), (16 * WARPS, 16))
    q = gl.convert_layout(q, A, assert_trivial=True)
    a0, a1 = unpack_pair(q, 0, low, ZEROS)
    a2, a3 = unpack_pair(q, 1, high, ZEROS)
    a = gl.join(gl.join(a0, a1), gl.join(a2, a3))
    a = gl.reshape(gl.permute(a, (0, 3, 2, 1)), (16 * WARPS, 64))
    return gl.convert_layout(a, A, assert_trivial=True)


@gluon.jit
def tile_count(NB, MB, BLOCKS: gl.constexpr, SPLIT: gl.constexpr):
    """Tiles of the product, each counted once for every program that shares it."""
    return (NB + BLOCKS - 1) // BLOCKS * MB * SPLIT


@gluon.jit
def place(index, C, NB, MB, BLOCKS: gl.constexpr, KH: gl.constexpr, COLUMNS: gl.constexpr, SPLIT: gl.constexpr):
    """Where a tile begins, in blocks of 64 rows and in tokens, and which stages of K are this program's: first, count.

    Bands of TOKEN_TILES tiles of tokens come one after the other, in a band all rows.
    """
    part = index % SPLIT
    tile = index // SPLIT
    tiles = (NB + BLOCKS - 1) // BLOCKS
    band = tile // (TOKEN_TILES * tiles)
    width = gl.minimum(MB - band * TOKEN_TILES, TOKEN_TILES)
    within = tile % (TOKEN_TILES * tiles)
    stages = (C + KH - 1) // KH
    first = part * stages // SPLIT
    count = (part + 1) * stages // SPLIT - first
    return within // width * BLOCKS, (band * TOKEN_TILES + within % width) * COLUMNS, first, count


@gluon.jit
def load_words(wd, ws, bar, stage, block, kk, KH: gl.constexpr):
    """One stage of words: chunk after chunk, in each the blocks of 64 rows one after the other."""
    async_load(wd, [kk * KH, block, 0, 0], bar, ws.index(stage))


@gluon.jit
def load_x(xd, xd2, xs, xs2, bar, stage, m0, kk, KH: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr):
    """One stage of x: KH tiles of 64 columns."""
    for h in gl.static_range(KH):
        async_load(xd, [m0, (kk * KH + h) * 64], bar, xs.index(stage * KH + h))
        if BM2:
            async_load(xd2, [m0 + BM, (kk * KH + h) * 64], bar, xs2.index(stage * KH + h))


@gluon.jit
def producer(xd, xd2, wd, xs, xs2, ws, full, empty, C, NB, MB, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
             KH: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr, SPLIT: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """Fill the ring for one tile after the other. Words of the first stages do not wait for the kernel before."""
    BYTES: gl.constexpr = wd.block_type.nbytes + KH * (BM + BM2) * 128
    block, m0, kk, n = place(gl.program_id(0), C, NB, MB, BLOCKS, KH, BM + BM2, SPLIT)
    early = gl.minimum(n, STAGES)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        load_words(wd, ws, full.index(i), i, block, kk + i, KH)
    if PDL:
        wait_for_previous_kernel(False)
    for i in range(early):
        load_x(xd, xd2, xs, xs2, full.index(i), i, m0, kk + i, KH, BM, BM2)
    stage = early % STAGES
    phase = (early < STAGES).to(gl.int32)  # a stage that was never filled counts as emptied in phase 1
    for tile in range(gl.program_id(0), tile_count(NB, MB, BLOCKS, SPLIT), gl.num_programs(0)):
        block, m0, kk, n = place(tile, C, NB, MB, BLOCKS, KH, BM + BM2, SPLIT)
        for i in range(gl.where(tile == gl.program_id(0), early, 0), n):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_words(wd, ws, bar, stage, block, kk + i, KH)
            load_x(xd, xd2, xs, xs2, bar, stage, m0, kk + i, KH, BM, BM2)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def load_scales(values_of, rows, kk, GROUPS, R: gl.constexpr, PARTS: gl.constexpr):
    """Scales or zero points of a stage: PARTS groups of each of R row blocks; past the end, the last group.

    rows: for each row block, where its rows begin. Pairs of rows are known to be neighbours and loaded as one word: two
    loads would have to be combined at once, and the K loop would wait for memory.
    """
    values = ()
    for r in gl.static_range(R):
        for i in gl.static_range(PARTS):
            group = gl.minimum(kk * PARTS + i, GROUPS - 1)
            values = values + (gl.load(values_of + rows[r] + group * 64),)  # type: ignore[assignment]
    return values


@gluon.jit
def multiply_all(xs, xs2, ws, scales, zeros, full, empty, stage, phase, rows, kk, n, GROUPS, STAGES: gl.constexpr,
                 WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr, PARTS: gl.constexpr, BM: gl.constexpr,
                 BM2: gl.constexpr, ZEROS: gl.constexpr):  # fmt: skip
    """Sums over stages kk to kk + n: [16 WARPS, BM] float32 of the first row block, and of the second one or of BM2."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    MMA2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM2 if BM2 else 8, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    WARP_ROWS: gl.constexpr = [[4, 0], [8, 0], [16, 0], [32, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        WARP_ROWS[: 2 if WARPS == 4 else (3 if WARPS == 8 else 4)], [], [4 * WARPS, 64])  # fmt: skip
    gl.assume(n > 0)
    acc0 = warpgroup_mma_init(gl.zeros((16 * WARPS, BM), gl.float32, MMA))
    acc1 = acc0
    if R == 2:
        acc1 = warpgroup_mma_init(gl.zeros((16 * WARPS, BM), gl.float32, MMA))
    if BM2:
        acc1 = warpgroup_mma_init(gl.zeros((16 * WARPS, BM2), gl.float32, MMA2))
    before = 0  # not `stage`: Triton carries a name round a loop only if it sees it change
    next_s = load_scales(scales, rows, kk, GROUPS, R, PARTS)
    next_z = load_scales(zeros, rows, kk, GROUPS, R, PARTS) if ZEROS else next_s
    for i in range(n):
        s, z = next_s, next_z
        next_s = load_scales(scales, rows, kk + i + 1, GROUPS, R, PARTS)
        next_z = load_scales(zeros, rows, kk + i + 1, GROUPS, R, PARTS) if ZEROS else next_s
        mbarrier.wait(full.index(stage), phase)
        words = ws.index(stage).reshape([KH * R * 4 * WARPS, 64])
        for h in gl.static_range(KH):
            xb = xs.index(stage * KH + h).permute((1, 0))
            for r in gl.static_range(R):
                p = words.slice((h * R + r) * 4 * WARPS, 4 * WARPS, 0).load(WORDS)
                low = scale_terms(s[r * PARTS + 2 * h * PARTS // (2 * KH)], z[r * PARTS + 2 * h * PARTS // (2 * KH)],
                                  MMA, WARPS, ZEROS)  # fmt: skip
                high = scale_terms(s[r * PARTS + (2 * h + 1) * PARTS // (2 * KH)],
                                   z[r * PARTS + (2 * h + 1) * PARTS // (2 * KH)], MMA, WARPS, ZEROS)  # fmt: skip
                a = unpack(p, low, high, A, WARPS, ZEROS)
                if r == 1:
                    acc1 = warpgroup_mma(a, xb, acc1, is_async=True)
                    acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
                else:
                    acc0 = warpgroup_mma(a, xb, acc0, is_async=True)
                    if R == 2:
                        acc1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc1]))
                    elif BM2:
                        a2 = gl.convert_layout(a, gl.DotOperandLayout(0, MMA2, 2), assert_trivial=True)
                        acc1 = warpgroup_mma(a2, xs2.index(stage * KH + h).permute((1, 0)), acc1, is_async=True)
                        done0, done1 = warpgroup_mma_wait(2, deps=[acc0, acc1])
                        acc0 = warpgroup_mma_init(done0)
                        acc1 = warpgroup_mma_init(done1)
                    else:
                        acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
                    if h == 0:  # the WGMMAs of the stage before are done, and so is the stage
                        mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if R == 2 or BM2:
        sum0, sum1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    else:
        sum0 = warpgroup_mma_wait(0, deps=[acc0])
        sum1 = sum0
    mbarrier.arrive(empty.index(before), count=1)
    return sum0, sum1, stage, phase


@gluon.jit
def store_tile(acc, out, bias, scale, n0, m0, M, N, BM: gl.constexpr, WARPS: gl.constexpr, BIAS: gl.constexpr):
    """Rows n0 to n0 + 16 WARPS of out^T by BM tokens."""
    acc *= scale
    if BIAS:
        ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
        n = n0 + gl.arange(0, 16 * WARPS, layout=ROW)
        acc += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [WARPS // 4, 4], [0, 1])
    v = gl.convert_layout(acc.to(out.dtype.element_ty), OUT)
    n = n0 + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, OUT))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))
    gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], v, mask=(m < M)[None, :] & (n < N)[:, None])


@gluon.jit
def in_order(acc, BM: gl.constexpr, WARPS: gl.constexpr):
    """The sums of a tile as one vector whose layout is 16 bytes a thread, side by side."""
    v = gl.permute(gl.reshape(acc, (WARPS, 2, 8, BM // 8, 4, 2)), (3, 0, 2, 4, 1, 5))
    return gl.reshape(v, (16 * WARPS * BM,))


@gluon.jit
def sum_partials(like, at, BM: gl.constexpr, WARPS: gl.constexpr, SPLIT: gl.constexpr, STRIDE: gl.constexpr):
    """The partial sums of SPLIT programs, added in order; layout and shape of `like`."""
    L: gl.constexpr = in_order(like, BM, WARPS).type.layout
    at += gl.arange(0, 16 * WARPS * BM, layout=L)
    v = gl.load(at, cache_modifier=".cg")
    for j in gl.static_range(1, SPLIT):
        v += gl.load(at + j * STRIDE, cache_modifier=".cg")
    v = gl.permute(gl.reshape(v, (BM // 8, WARPS, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(v, (16 * WARPS, BM)), like.type.layout, assert_trivial=True)


@gluon.jit
def meet(sum0, sum1, partials, counters, part, BM: gl.constexpr, BMS: gl.constexpr, WARPS: gl.constexpr,
         TWO: gl.constexpr, SPLIT: gl.constexpr):  # fmt: skip
    """Leave this program's sums for the last of SPLIT programs; returns whether that is this one, and all sums.

    partials, counters: those of the tile.
    """
    SIZE: gl.constexpr = 16 * WARPS * BM
    STRIDE: gl.constexpr = SIZE + (16 * WARPS * BMS if TWO else 0)
    v = in_order(sum0, BM, WARPS)
    gl.store(partials + part * STRIDE + gl.arange(0, SIZE, layout=v.type.layout), v)
    if TWO:
        v = in_order(sum1, BMS, WARPS)
        gl.store(partials + part * STRIDE + SIZE + gl.arange(0, 16 * WARPS * BMS, layout=v.type.layout), v)
    barrier()
    last = gl.atomic_add(counters, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
    if last:
        gl.store(counters, 0)
        sum0 = sum_partials(sum0, partials, BM, WARPS, SPLIT, STRIDE)
        if TWO:
            sum1 = sum_partials(sum1, partials + SIZE, BMS, WARPS, SPLIT, STRIDE)
    return last, sum0, sum1


@gluon.jit
def consumer(xs, xs2, ws, scales, zeros, bias, full, empty, out, partials, counters, scale, M, N, C, NB, MB,
             STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr, GROUP: gl.constexpr,
             BM: gl.constexpr, BM2: gl.constexpr, SPLIT: gl.constexpr, ZEROS: gl.constexpr, BIAS: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """Multiply, meet the other programs of the tile if there are any, store; then the next tile."""
    BLOCKS: gl.constexpr = WARPS * R // 4
    TWO: gl.constexpr = R == 2 or BM2 > 0
    BMS: gl.constexpr = BM2 if BM2 else BM  # tokens of the second accumulator, and where it begins
    N1: gl.constexpr = 16 * WARPS if R == 2 else 0
    M1: gl.constexpr = BM if BM2 else 0
    ROWS: gl.constexpr = gl.DistributedLinearLayout(
        [[1]], [[0], [0], [2], [4], [8]], [[16], [32], [64], [128]][: 2 if WARPS == 4 else (3 if WARPS == 8 else 4)],
        [], [16 * WARPS])  # fmt: skip
    i = gl.arange(0, 16 * WARPS, layout=ROWS)  # (block, warp, r, b1); rows past the end read those of the last block
    order = i // 2 % 8 * 8 + i // 16 % 4 * 2 + i % 2
    GROUPS = C * 64 // GROUP
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), tile_count(NB, MB, BLOCKS, SPLIT), gl.num_programs(0)):
        block, m0, kk, n = place(tile, C, NB, MB, BLOCKS, KH, BM + BM2, SPLIT)
        rows = (gl.minimum(block + i // 64, NB - 1) * GROUPS * 64 + order,
                gl.minimum(block + WARPS // 4 + i // 64, NB - 1) * GROUPS * 64 + order)  # fmt: skip
        sum0, sum1, stage, phase = multiply_all(xs, xs2, ws, scales, zeros, full, empty, stage, phase, rows, kk, n,
                                                GROUPS, STAGES, WARPS, R, KH, KH * 64 // GROUP, BM, BM2,
                                                ZEROS)  # fmt: skip
        if PDL:
            wait_for_previous_kernel(False)
        last = True
        if SPLIT > 1:
            at = partials + tile // SPLIT * (SPLIT * 16 * WARPS * (R * BM + BM2))
            last, sum0, sum1 = meet(sum0, sum1, at, counters + tile // SPLIT, tile % SPLIT, BM, BMS, WARPS, TWO, SPLIT)
        if last:
            store_tile(sum0, out, bias, scale, block * 64, m0, M, N, BM, WARPS, BIAS)
            if TWO:
                store_tile(sum1, out, bias, scale, block * 64 + N1, m0 + M1, M, N, BMS, WARPS, BIAS)


@gluon.jit(do_not_specialize=["M", "C", "NB", "MB", "scale"])
def w4a16_gluon_kernel(xd, xd2, wd, scales, zeros, bias, out, partials, counters, scale, M, N, C, NB, MB,
                       STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr,
                       GROUP: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr, SPLIT: gl.constexpr,
                       ZEROS: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Any grid if SPLIT is 1, else `tile_count`. C, NB: blocks of 64 columns, of 64 rows. MB: tiles of tokens."""
    if PDL:
        wait_for_previous_kernel(True)
    BLOCKS: gl.constexpr = WARPS * R // 4
    xs = gl.allocate_shared_memory(xd.dtype, [STAGES * KH, BM, 64], xd.layout)
    xs2 = xs
    if BM2:
        xs2 = gl.allocate_shared_memory(xd2.dtype, [STAGES * KH, BM2, 64], xd2.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, KH, BLOCKS, 16, 64], wd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (consumer, (xs, xs2, ws, scales, zeros, bias, full, empty, out, partials, counters, scale, M, N, C, NB, MB,
                    STAGES, WARPS, R, KH, GROUP, BM, BM2, SPLIT, ZEROS, BIAS, PDL)),
        (producer, (xd, xd2, wd, xs, xs2, ws, full, empty, C, NB, MB, STAGES, BLOCKS, KH, BM, BM2, SPLIT, PDL)),
    ], [1], [24])  # fmt: skip
