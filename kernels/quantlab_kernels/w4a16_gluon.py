"""W4A16 and W8A16 on Hopper (sm_90a), in Gluon: out[m, n] = sum_k x[m, k] W[n, k], on WGMMA.

out^T = W x^T with W as operand A from registers. One producer warp fills a ring of STAGES stages by TMA (words of BN
rows, x of BM tokens, 64 PER columns each; 64 KH columns make an iteration, whose scales are loaded together: wide tiles
have stages of half an iteration, so that enough of them fit). WARPS consumer warps unpack words to weights in registers
(w4a16_unpack) and issue asynchronous WGMMAs, one batch of 64 columns in flight while the next is unpacked. Scales are
in the weights, so sums run over all of K without being touched.

A program makes a tile of BN = 16 WARPS R rows by BM (+ BM2) tokens. R = 2: two row blocks share x. BM2 > 0: two widths
of WGMMA share the unpacked weights, for token counts between powers of two. Tiles that several programs share are added
up as gluon_schedule says.

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

from quantlab_kernels.gluon_schedule import meet, piece, place, span, wait_for_previous_kernel
from quantlab_kernels.w4a16_unpack import assembly

# Gluon renames its functions between releases: the left name is that of Triton 3.9, the right one of 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def minus_half(scale, BITS: gl.constexpr):
    """Minus what a code of 0 is stored as, times scale, as a weight has it; see w4a16_unpack.minus_half."""
    SHIFT: gl.constexpr = 130 if BITS == 4 else 126
    if scale.dtype == gl.bfloat16:
        bits = scale.to(gl.int16, bitcast=True)
        product = gl.where((bits & 0x7FFF) > (SHIFT << 7), (bits - (SHIFT << 7)) ^ -0x8000, 0).to(gl.int16)
        term = product.to(gl.bfloat16, bitcast=True)
    else:
        term = scale * -(2.0**-21 if BITS == 4 else 2.0**-17)
    return term


@gluon.jit
def scale_terms(s, z, MMA: gl.constexpr, WARPS: gl.constexpr, ZEROS: gl.constexpr, BITS: gl.constexpr):
    """The four operands of unpacking, [16 WARPS, 1] each. s, z: [16 WARPS] as stored, row (w, r, b1)."""
    A: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, MMA, 2))
    s = gl.reshape(gl.permute(gl.reshape(s, (WARPS, 8, 2)), (0, 2, 1)), (16 * WARPS,))
    s0 = gl.expand_dims(gl.convert_layout(s, A, assert_trivial=True), 1)
    s1 = s0 * 0.0625 if BITS == 4 else s0
    if ZEROS:
        z = gl.reshape(gl.permute(gl.reshape(z, (WARPS, 8, 2)), (0, 2, 1)), (16 * WARPS,))
        z = gl.expand_dims(gl.convert_layout(z, A, assert_trivial=True), 1)
        t0 = z.to(s0.dtype, bitcast=True)
        t1 = ((z << 4) | -32768).to(gl.int16).to(s0.dtype, bitcast=True) if BITS == 4 else t0
    else:
        t0 = minus_half(s0, BITS)
        t1 = t0
    return s0, s1, t0, t1


@gluon.jit
def unpack_pair(q, pair: gl.constexpr, terms, ZEROS: gl.constexpr, BITS: gl.constexpr):
    """Codes 2 pair and 2 pair + 1 of words q [16 WARPS, 16] as weights; 8-bit words have two."""
    if terms[0].dtype == gl.bfloat16:
        a = gl.inline_asm_elementwise(assembly(True, pair, ZEROS, BITS), "=r,=r,r,r,r,r,r",
                                      [q, terms[0], terms[1], terms[2], terms[3]],
                                      dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2)  # fmt: skip
    else:
        a = gl.inline_asm_elementwise(assembly(False, pair, ZEROS, BITS), "=r,=r,r,r,r,r,r",
                                      [q, terms[0], terms[1], terms[2], terms[3]],
                                      dtype=(gl.float16, gl.float16), is_pure=True, pack=2)  # fmt: skip
    return a


@gluon.jit
def words_of(p, A: gl.constexpr, WARPS: gl.constexpr):
    """Words [4 WARPS, 64] as stored, as [16 WARPS, 16]: a row's words, a thread's in its own registers."""
    q = gl.reshape(gl.permute(gl.reshape(p, (WARPS, 8, 4, 2, 2, 2)), (0, 4, 1, 3, 2, 5)), (16 * WARPS, 16))
    return gl.convert_layout(q, A, assert_trivial=True)


@gluon.jit
def unpack(words, row: gl.constexpr, next_row: gl.constexpr, low, high, WORDS: gl.constexpr, A: gl.constexpr,
           WARPS: gl.constexpr, ZEROS: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """Operand A [16 WARPS, 64] from words in shared memory at `row` and, if 8-bit, 32 columns further at `next_row`.

    low, high: terms of columns 0-31 and 32-63.
    """
    q = words_of(words.slice(row, 4 * WARPS, 0).load(WORDS), A, WARPS)
    a0, a1 = unpack_pair(q, 0, low, ZEROS, BITS)
    if BITS == 8:
        q = words_of(words.slice(next_row, 4 * WARPS, 0).load(WORDS), A, WARPS)
    a2, a3 = unpack_pair(q, 1 if BITS == 4 else 0, high, ZEROS, BITS)
    a = gl.join(gl.join(a0, a1), gl.join(a2, a3))
    a = gl.reshape(gl.permute(a, (0, 3, 2, 1)), (16 * WARPS, 64))
    return gl.convert_layout(a, A, assert_trivial=True)


@gluon.jit
def load_words(wd, ws, bar, stage, block, kk):
    """One stage of words: 2 KB after 2 KB along K, in each the blocks of 64 rows one after the other."""
    async_load(wd, [kk * wd.block_type.shape[0], block, 0, 0], bar, ws.index(stage))


@gluon.jit
def load_x(xd, xd2, xs, xs2, bar, stage, m0, kk, PER: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr):
    """One stage of x: PER tiles of 64 columns."""
    for h in gl.static_range(PER):
        async_load(xd, [m0, (kk * PER + h) * 64], bar, xs.index(stage * PER + h))
        if BM2:
            async_load(xd2, [m0 + BM, (kk * PER + h) * 64], bar, xs2.index(stage * PER + h))


@gluon.jit
def producer(xd, xd2, wd, xs, xs2, ws, full, empty, C, NB, MB, streamed, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
             KH: gl.constexpr, PER: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr,
             PDL: gl.constexpr):  # fmt: skip
    """Fill the ring for one piece after the other. Words of the first stages do not wait for the kernel before."""
    BYTES: gl.constexpr = wd.block_type.nbytes + PER * (BM + BM2) * 128
    PARTS: gl.constexpr = KH // PER  # stages of the ring in an iteration, by which pieces are counted
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    row_tiles = (NB + BLOCKS - 1) // BLOCKS
    stages = (C + KH - 1) // KH
    begin, end, limit = span(program, programs, row_tiles * MB, streamed, stages)
    tile, kk, n = piece(begin, end, program, programs, streamed, stages)
    rows, tokens = place(tile, row_tiles, MB)
    early = gl.minimum(n * PARTS, STAGES)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        load_words(wd, ws, full.index(i), i, rows * BLOCKS, kk * PARTS + i)
    if PDL:
        wait_for_previous_kernel(False)
    for i in range(early):
        load_x(xd, xd2, xs, xs2, full.index(i), i, tokens * (BM + BM2), kk * PARTS + i, PER, BM, BM2)
    stage = early % STAGES
    phase = (early < STAGES).to(gl.int32)  # a stage that was never filled counts as emptied in phase 1
    at = begin
    while at < limit:
        tile, kk, n = piece(at, end, program, programs, streamed, stages)
        rows, tokens = place(tile, row_tiles, MB)
        for i in range(gl.where(at == begin, early, 0), n * PARTS):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load_words(wd, ws, bar, stage, rows * BLOCKS, kk * PARTS + i)
            load_x(xd, xd2, xs, xs2, bar, stage, tokens * (BM + BM2), kk * PARTS + i, PER, BM, BM2)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        at += n


@gluon.jit
def load_scales(values_of, rows, kk, GROUPS, R: gl.constexpr, PARTS: gl.constexpr):
    """Scales or zero points of an iteration: PARTS groups of each of R row blocks; past the end, the last group.

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
                 WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr, PER: gl.constexpr, PARTS: gl.constexpr,
                 BM: gl.constexpr, BM2: gl.constexpr, ZEROS: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """Sums over iterations kk to kk + n, [16 WARPS, BM] float32: of the first row block, of the second or of BM2."""
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
        for h in gl.static_range(KH):
            if h % PER == 0:
                mbarrier.wait(full.index(stage), phase)
            words = ws.index(stage).reshape([BITS // 4 * PER * R * 4 * WARPS, 64])
            xb = xs.index(stage * PER + h % PER).permute((1, 0))
            for r in gl.static_range(R):
                low = scale_terms(s[r * PARTS + 2 * h * PARTS // (2 * KH)], z[r * PARTS + 2 * h * PARTS // (2 * KH)],
                                  MMA, WARPS, ZEROS, BITS)  # fmt: skip
                high = scale_terms(s[r * PARTS + (2 * h + 1) * PARTS // (2 * KH)],
                                   z[r * PARTS + (2 * h + 1) * PARTS // (2 * KH)], MMA, WARPS, ZEROS,
                                   BITS)  # fmt: skip
                a = unpack(words, (h % PER * (BITS // 4) * R + r) * 4 * WARPS,
                           ((h % PER * (BITS // 4) + 1) * R + r) * 4 * WARPS, low, high, WORDS, A, WARPS, ZEROS,
                           BITS)  # fmt: skip
                if r == 1:
                    acc1 = warpgroup_mma(a, xb, acc1, is_async=True)
                    acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
                else:
                    acc0 = warpgroup_mma(a, xb, acc0, is_async=True)
                    if R == 2:
                        acc1 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc1]))
                    elif BM2:
                        a2 = gl.convert_layout(a, gl.DotOperandLayout(0, MMA2, 2), assert_trivial=True)
                        xb2 = xs2.index(stage * PER + h % PER).permute((1, 0))
                        acc1 = warpgroup_mma(a2, xb2, acc1, is_async=True)
                        done0, done1 = warpgroup_mma_wait(2, deps=[acc0, acc1])
                        acc0 = warpgroup_mma_init(done0)
                        acc1 = warpgroup_mma_init(done1)
                    else:
                        acc0 = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc0]))
                    if h % PER == 0:  # the WGMMAs of the stage before are done, and so is the stage
                        mbarrier.arrive(empty.index(before), count=1, pred=(i > 0) | (h > 0))
            if h % PER == PER - 1:
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
def consumer(xs, xs2, ws, scales, zeros, bias, full, empty, out, partials, counters, scale, M, N, C, NB, MB, streamed,
             STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr, PER: gl.constexpr,
             GROUP: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr, SPLIT: gl.constexpr, ZEROS: gl.constexpr,
             BIAS: gl.constexpr, BITS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Multiply, meet the other programs of the tile if there are any, store; then the next piece."""
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
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    row_tiles = (NB + BLOCKS - 1) // BLOCKS
    stages = (C + KH - 1) // KH
    at, end, limit = span(program, programs, row_tiles * MB, streamed, stages)
    stage = 0
    phase = 0
    while at < limit:
        tile, kk, n = piece(at, end, program, programs, streamed, stages)
        row_tile, tokens = place(tile, row_tiles, MB)
        block = row_tile * BLOCKS
        m0 = tokens * (BM + BM2)
        rows = (gl.minimum(block + i // 64, NB - 1) * GROUPS * 64 + order,
                gl.minimum(block + WARPS // 4 + i // 64, NB - 1) * GROUPS * 64 + order)  # fmt: skip
        sum0, sum1, stage, phase = multiply_all(xs, xs2, ws, scales, zeros, full, empty, stage, phase, rows, kk, n,
                                                GROUPS, STAGES, WARPS, R, KH, PER, KH * 64 // GROUP, BM, BM2,
                                                ZEROS, BITS)  # fmt: skip
        if PDL:
            wait_for_previous_kernel(False)
        last = n == stages
        if SPLIT != 1:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
            if not last:
                last, sum0, sum1 = meet(sum0, sum1, partials, counters, tile, kk, program, programs, streamed, stages,
                                        1, WARPS, BM, BMS, TWO, SPLIT)  # fmt: skip
        if last:
            store_tile(sum0, out, bias, scale, block * 64, m0, M, N, BM, WARPS, BIAS)
            if TWO:
                store_tile(sum1, out, bias, scale, block * 64 + N1, m0 + M1, M, N, BMS, WARPS, BIAS)
        at += n


@gluon.jit(do_not_specialize=["M", "C", "NB", "MB", "streamed", "scale"])
def w4a16_gluon_kernel(xd, xd2, wd, scales, zeros, bias, out, partials, counters, scale, M, N, C, NB, MB, streamed,
                       STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr,
                       PER: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BM2: gl.constexpr,
                       SPLIT: gl.constexpr, ZEROS: gl.constexpr, BIAS: gl.constexpr, BITS: gl.constexpr,
                       PDL: gl.constexpr):  # fmt: skip
    """C, NB: blocks of 64 columns, of 64 rows. MB: tiles of tokens. Grid, streamed, SPLIT: see gluon_schedule."""
    if PDL:
        wait_for_previous_kernel(True)
    BLOCKS: gl.constexpr = WARPS * R // 4
    xs = gl.allocate_shared_memory(xd.dtype, [STAGES * PER, BM, 64], xd.layout)
    xs2 = xs
    if BM2:
        xs2 = gl.allocate_shared_memory(xd2.dtype, [STAGES * PER, BM2, 64], xd2.layout)
    ws = gl.allocate_shared_memory(gl.int16, [STAGES, PER * BITS // 4, BLOCKS, 16, 64], wd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (consumer, (xs, xs2, ws, scales, zeros, bias, full, empty, out, partials, counters, scale, M, N, C, NB, MB,
                    streamed, STAGES, WARPS, R, KH, PER, GROUP, BM, BM2, SPLIT, ZEROS, BIAS, BITS, PDL)),
        (producer, (xd, xd2, wd, xs, xs2, ws, full, empty, C, NB, MB, streamed, STAGES, BLOCKS, KH, PER, BM, BM2, PDL)),
    ], [1], [24])  # fmt: skip
