"""W8A8 on Hopper (sm_90a), in Gluon: out[m, n] = (sum_k x[m, k] W[n, k]) * x_scale[m] * scale[n] + bias[n], on WGMMA.

out^T = W x^T, both operands from shared memory: rows of W are the 64 that a WGMMA always has, tokens the 8 to 256 that
it may have, so that few tokens waste nothing. One producer warp fills a ring of STAGES stages by TMA (W of BN rows, x
of BM tokens, 128 KH columns each); WARPS consumer warps keep one stage of WGMMAs in flight while the next arrives. Sums
are int32 and exact, so that tiles which several programs share (gluon_schedule) have the same bits in any order.
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

# Gluon renames its functions between releases: the left name is that of Triton 3.9, the right one of 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def load(source, ring, bar, stage, row, kk, KH: gl.constexpr):
    """One stage of x or W: KH tiles of 128 columns."""
    for h in gl.static_range(KH):
        async_load(source, [row, (kk * KH + h) * 128], bar, ring.index(stage * KH + h))


@gluon.jit
def producer(xd, wd, xs, ws, full, empty, row_tiles, token_tiles, stages, streamed, STAGES: gl.constexpr,
             KH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Fill the ring for one piece after the other. W of the first stages does not wait for the kernel before."""
    BYTES: gl.constexpr = KH * (BM + BN) * 128
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    begin, end, limit = span(program, programs, row_tiles * token_tiles, streamed, stages)
    tile, kk, n = piece(begin, end, program, programs, streamed, stages)
    rows, tokens = place(tile, row_tiles, token_tiles)
    early = gl.minimum(n, STAGES)
    for i in range(early):
        mbarrier.expect(full.index(i), BYTES)
        load(wd, ws, full.index(i), i, rows * BN, kk + i, KH)
    if PDL:
        wait_for_previous_kernel(False)
    for i in range(early):
        load(xd, xs, full.index(i), i, tokens * BM, kk + i, KH)
    stage = early % STAGES
    phase = (early < STAGES).to(gl.int32)  # a stage that was never filled counts as emptied in phase 1
    at = begin
    while at < limit:
        tile, kk, n = piece(at, end, program, programs, streamed, stages)
        rows, tokens = place(tile, row_tiles, token_tiles)
        for i in range(gl.where(at == begin, early, 0), n):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            load(wd, ws, bar, stage, rows * BN, kk + i, KH)
            load(xd, xs, bar, stage, tokens * BM, kk + i, KH)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        at += n


@gluon.jit
def multiply_all(xs, ws, full, empty, stage, phase, n, STAGES: gl.constexpr, WARPS: gl.constexpr, BN: gl.constexpr,
                 KH: gl.constexpr, BM: gl.constexpr):  # fmt: skip
    """Sums over n stages, [BN, BM] int32, and where the ring is then."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM if BM < 128 else 128, 32])
    gl.assume(n > 0)
    acc = warpgroup_mma_init(gl.zeros((BN, BM), gl.int32, MMA))
    before = 0  # not `stage`: Triton carries a name round a loop only if it sees it change
    for i in range(n):
        mbarrier.wait(full.index(stage), phase)
        for h in gl.static_range(KH):
            acc = warpgroup_mma(ws.index(stage * KH + h), xs.index(stage * KH + h).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(KH, deps=[acc]))
        mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    total = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before), count=1)
    return total, stage, phase


@gluon.jit
def store_tile(acc, x_scales, scales, bias, out, n0, m0, M, N, BN: gl.constexpr, BM: gl.constexpr,
               WARPS: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """Rows n0 to n0 + BN of out^T by BM tokens, scaled."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    n = n0 + gl.arange(0, BN, layout=ROW)
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, acc.type.layout))
    y = acc.to(gl.float32) * gl.expand_dims(gl.load(x_scales + m, mask=m < M, other=0.0), 0)
    y *= gl.expand_dims(gl.load(scales + n, mask=n < N, other=0.0), 1)
    if BIAS:
        y += gl.expand_dims(gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32), 1)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [WARPS // 4, 4], [0, 1])
    v = gl.convert_layout(y.to(out.dtype.element_ty), OUT)
    n = n0 + gl.arange(0, BN, layout=gl.SliceLayout(1, OUT))
    m = m0 + gl.arange(0, BM, layout=gl.SliceLayout(0, OUT))
    gl.store(out + m.to(gl.int64)[None, :] * N + n[:, None], v, mask=(m < M)[None, :] & (n < N)[:, None])


@gluon.jit
def consumer(xs, ws, x_scales, scales, bias, full, empty, out, partials, counters, M, N, row_tiles, token_tiles,
             stages, streamed, STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr,
             BM: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """Multiply, meet the other programs of the tile if there are any, store; then the next piece."""
    BN: gl.constexpr = 16 * WARPS * R
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    at, end, limit = span(program, programs, row_tiles * token_tiles, streamed, stages)
    stage = 0
    phase = 0
    while at < limit:
        tile, kk, n = piece(at, end, program, programs, streamed, stages)
        rows, tokens = place(tile, row_tiles, token_tiles)
        acc, stage, phase = multiply_all(xs, ws, full, empty, stage, phase, n, STAGES, WARPS, BN, KH, BM)
        if PDL:
            wait_for_previous_kernel(False)
        last = n == stages
        if SPLIT != 1:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
            if not last:
                last, acc, _ = meet(acc, acc, partials, counters, tile, kk, program, programs, streamed, stages, R,
                                    WARPS, BM, BM, False, SPLIT)  # fmt: skip
        if last:
            store_tile(acc, x_scales, scales, bias, out, rows * BN, tokens * BM, M, N, BN, BM, WARPS, BIAS)
        at += n


@gluon.jit(do_not_specialize=["M", "row_tiles", "token_tiles", "stages", "streamed"])
def w8a8_gluon_kernel(xd, wd, x_scales, scales, bias, out, partials, counters, M, N, row_tiles, token_tiles, stages,
                      streamed, STAGES: gl.constexpr, WARPS: gl.constexpr, R: gl.constexpr, KH: gl.constexpr,
                      BM: gl.constexpr, SPLIT: gl.constexpr, BIAS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """A tile: 16 WARPS R rows by BM tokens; stages: of a whole tile. Grid, streamed, SPLIT: see gluon_schedule."""
    if PDL:
        wait_for_previous_kernel(True)
    BN: gl.constexpr = 16 * WARPS * R
    xs = gl.allocate_shared_memory(gl.int8, [STAGES * KH, BM, 128], xd.layout)
    ws = gl.allocate_shared_memory(gl.int8, [STAGES * KH, BN, 128], wd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (consumer, (xs, ws, x_scales, scales, bias, full, empty, out, partials, counters, M, N, row_tiles, token_tiles,
                    stages, streamed, STAGES, WARPS, R, KH, BM, SPLIT, BIAS, PDL)),
        (producer, (xd, wd, xs, ws, full, empty, row_tiles, token_tiles, stages, streamed, STAGES, KH, BM, BN, PDL)),
    ], [1], [24])  # fmt: skip
