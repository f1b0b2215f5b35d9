"""Prefill over a 16-bit cache on sm_90: a warp fetches blocks by TMA, two groups of four work (after FlashAttention-3,
arXiv 2407.08608), in Gluon.

The producer walks the keys of its tile from the last step to the first, looks blocks up a step ahead, and fills rings
of K and V stages. A box of the copy is (tokens of a cache block) x 64 channels, so blocks of 16 tokens cost no more
than large ones. Each consumer, a warpgroup with 64 of the tile's rows, issues the scores of a step, then the output of
the step before, and does the softmax while the tensor cores work on the latter. The two share the stages and nothing
else, so one's softmax also hides behind the other's products: as one partition of eight warps they ran at 0.82 of this.

Stages hold [KEYS, DIM] as wgmma reads it: panels of 64 channels, 128-byte swizzle. DIM is a power of two; TMA fills the
channels past HEAD_DIM with zeros. Gluon changes between releases of Triton: `RELEASES` says where this kernel is known
to be right; elsewhere `paged_prefill` serves.
"""

from math import gcd

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantlab_kernels.decode_parts import NO_WINDOW
from quantlab_kernels.kv_cache import KVCache, Pages

RELEASES = ("3.6",)
ROWS = 128
# A consumer's warps, and registers a thread: a processor's 65536 over the 12 warps that two consumers and a producer
# round up to; then the consumers get what the producer's group of four warps does not need.
WARPS, REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS = 4, 168, 232, 40
# Steps in flight. Two stages of K and V and the queries fill shared memory at head_dim 128.
STAGES = 2


@gluon.jit
def _look_up(
    table, head, first, lowest, last,
    KV_HEADS: gl.constexpr, KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Rows of the cache where the boxes of KEYS tokens from token `first` on begin."""
    rows = ()
    for box in gl.static_range(KEYS // BOX):
        # A box outside lowest .. last holds no key that anyone sees; some block that exists stands for it.
        token = gl.minimum(gl.maximum(first + box * BOX, lowest), last)
        block = gl.load(table + token // BLOCK_SIZE)
        row = (block * KV_HEADS + head) * BLOCK_SIZE + token % BLOCK_SIZE // BOX * BOX
        rows = rows + (row,)  # type: ignore[assignment]
    return rows


@gluon.jit
def _fill(source, boxes, rows, stage, full, empty, phase, KEYS: gl.constexpr, PANELS: gl.constexpr, BOX: gl.constexpr):
    """Fetch the boxes that begin at `rows` into one stage, once it is free."""
    BOXES: gl.constexpr = KEYS // BOX
    mbarrier.wait(empty.index(stage), phase)
    mbarrier.expect(full.index(stage), KEYS * PANELS * 128)
    for box in gl.static_range(BOXES):
        for panel in gl.static_range(PANELS):
            at = (stage * PANELS + panel) * BOXES + box
            tma.async_copy_global_to_shared(source, [rows[box], panel * 64], full.index(stage), boxes.index(at))


@gluon.jit
def _produce(
    k_source, v_source, k_boxes, v_boxes, bars, table, head, steps, high, lowest, last,
    STAGES: gl.constexpr, KV_HEADS: gl.constexpr, KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, PANELS: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    k_full, k_empty, v_full, v_empty, _ = bars
    stage, phase = 0, 1
    rows = _look_up(table, head, high * KEYS, lowest, last, KV_HEADS, KEYS, BLOCK_SIZE, BOX)
    for i in range(steps):
        # One step ahead: a look-up takes as long as the arithmetic of half a step.
        ahead = _look_up(table, head, (high - i - 1) * KEYS, lowest, last, KV_HEADS, KEYS, BLOCK_SIZE, BOX)
        _fill(k_source, k_boxes, rows, stage, k_full, k_empty, phase, KEYS, PANELS, BOX)
        _fill(v_source, v_boxes, rows, stage, v_full, v_empty, phase, KEYS, PANELS, BOX)
        rows = ahead
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _softmax(
    scores, most, total, scale, first, position, window, KEYS: gl.constexpr, MASK: gl.constexpr, WINDOW: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of one step [ROWS, KEYS], the new maximum and sum, and what the old output shrinks by."""
    if MASK:
        key = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen &= key[None, :] > (position - window)[:, None]
        scores = gl.where(seen, scores, -float("inf"))
    # `most` begins finite: a row that sees no key of this step adds exp2(-inf) = 0 and not NaN.
    larger = gl.maximum(most, gl.max(scores, 1) * scale)
    p = gl.exp2(scores * scale - larger[:, None])
    shrink = gl.exp2(most - larger)
    return p, larger, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _advance(
    q_tile, k_tiles, v_tiles, bars, acc, x, most, total, scale, first, position, window, stage, phase,
    k_stage, k_phase, M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    WINDOW: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of one step, output of the step before (whose weights are x), softmax of the former meanwhile."""
    k_full, k_empty, v_full, v_empty, _ = bars
    zeros = gl.zeros((M, KEYS), gl.float32, S_LAYOUT)
    # In 32 bits until here: 16-bit values carried by the loop would be packed and unpacked at its end.
    p = gl.convert_layout(x.to(q_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    mbarrier.wait(k_full.index(k_stage), k_phase)
    scores = warpgroup_mma(q_tile, k_tiles.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(k_stage), count=1)
    x, most, total, shrink = _softmax(scores, most, total, scale, first, position, window, KEYS, MASK, WINDOW, S_LAYOUT)
    # Until here p's registers, operand A of the product in flight, may not be written (seen in the machine code).
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(stage), count=1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT))
    acc = acc * shrink[:, None]
    stage, phase = k_stage, k_phase
    k_stage += 1
    if k_stage == STAGES:
        k_stage = 0
        k_phase ^= 1
    return acc, x, most, total, stage, phase, k_stage, k_phase


@gluon.jit
def _zero_unwritten(v_tile, first, lowest, n, KEYS: gl.constexpr, DIM: gl.constexpr):
    """Values outside lowest .. n - 1 become 0: a slot never written may hold NaN, and 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    token = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    values = v_tile.load(LAYOUT)
    v_tile.store(gl.where(((token >= lowest) & (token < n))[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def _consume(
    q, out, q_tile, k_tiles, v_tiles, bars, scale, q_stride, window, begin, count, n, tile, head, steps, bounds, high,
    lowest, PART: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr, M: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Rows PART * M and up of the tile. bounds: the steps from which, and up to which, every row sees every key."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, DIM, 16])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [gl.num_warps(), 1], [1, 0])
    TOKENS: gl.constexpr = 2 * M // GROUP
    k_full, k_empty, v_full, v_empty, v_zeroed = bars
    row = PART * M + gl.arange(0, M, layout=gl.SliceLayout(1, IO))
    channel = gl.arange(0, DIM, layout=gl.SliceLayout(0, IO))
    token = tile * TOKENS + row // GROUP
    ok = ((token < count) & (row < TOKENS * GROUP))[:, None] & (channel < HEAD_DIM)[None, :]
    at = (begin + token).to(gl.int64)[:, None] * q_stride + ((head * GROUP + row % GROUP) * HEAD_DIM)[:, None]
    q_tile.store(gl.load(q + at + channel[None, :], ok, 0.0))
    fence_async_shared()
    s_row = PART * M + gl.arange(0, M, layout=gl.SliceLayout(1, S_LAYOUT))
    position = n - count + tile * TOKENS + s_row // GROUP  # the last key that a row sees
    most = gl.full((M,), -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros((M,), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    acc = gl.zeros((M, DIM), gl.float32, O_LAYOUT)

    # The last step alone can hold slots that no token has; its scores come first, with nothing to overlap.
    mbarrier.wait(k_full.index(0), 0)
    zeros = gl.zeros((M, KEYS), gl.float32, S_LAYOUT)
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    x, most, total, shrink = _softmax(
        scores, most, total, scale, high * KEYS, position, window, KEYS, True, WINDOW, S_LAYOUT
    )
    if (high + 1) * KEYS > n:
        if PART == 0:
            mbarrier.wait(v_full.index(0), 0)
            _zero_unwritten(v_tiles.index(0), high * KEYS, lowest, n, KEYS, DIM)
            mbarrier.arrive(v_zeroed, count=1)
        else:
            mbarrier.wait(v_zeroed, 0)

    stage, phase = 0, 0
    k_stage, k_phase = 1 % STAGES, 1 // STAGES
    masked, whole = bounds
    for i in range(1, masked):
        acc, x, most, total, stage, phase, k_stage, k_phase = _advance(
            q_tile, k_tiles, v_tiles, bars, acc, x, most, total, scale, (high - i) * KEYS, position, window,
            stage, phase, k_stage, k_phase, M, KEYS, STAGES, True, WINDOW, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    for i in range(masked, whole):
        acc, x, most, total, stage, phase, k_stage, k_phase = _advance(
            q_tile, k_tiles, v_tiles, bars, acc, x, most, total, scale, (high - i) * KEYS, position, window,
            stage, phase, k_stage, k_phase, M, KEYS, STAGES, False, WINDOW, S_LAYOUT, O_LAYOUT,
        )  # fmt: skip
    if WINDOW:
        for i in range(whole, steps):
            acc, x, most, total, stage, phase, k_stage, k_phase = _advance(
                q_tile, k_tiles, v_tiles, bars, acc, x, most, total, scale, (high - i) * KEYS, position, window,
                stage, phase, k_stage, k_phase, M, KEYS, STAGES, True, WINDOW, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
    p = gl.convert_layout(x.to(q_tile.dtype), gl.DotOperandLayout(0, O_LAYOUT, 2))
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    total = gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))
    acc = acc * (1.0 / gl.where(total > 0, total, 1.0))[:, None]
    y = gl.convert_layout(acc.to(out.dtype.element_ty), IO)
    to = (begin + token).to(gl.int64)[:, None] * (KV_HEADS * GROUP) + (head * GROUP + row % GROUP)[:, None]
    gl.store(out + to * HEAD_DIM + channel[None, :], y, ok)


@gluon.jit(do_not_specialize=["table_stride", "window"])
def _prefill_hopper_kernel(
    q, k_source, v_source, blocks, lengths, starts, out, scale, q_stride, table_stride, window,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, M: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr, WINDOW: gl.constexpr,
    CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    head, sequence = gl.program_id(0), gl.program_id(2)
    TOKENS: gl.constexpr = M // GROUP
    PANELS: gl.constexpr = DIM // 64
    begin = gl.load(starts + sequence)
    count = gl.load(starts + sequence + 1) - begin
    n = gl.load(lengths + sequence)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the last tokens see the most keys
    if tile * TOKENS >= count:
        return
    earliest = n - count + tile * TOKENS
    high = (gl.minimum(n, earliest + TOKENS) - 1) // KEYS
    lowest = gl.maximum(earliest - window + 1, 0)
    steps = high - lowest // KEYS + 1
    # Steps, counted from the last keys on, whose keys lie up to the earliest token and in the latest one's window.
    masked = gl.maximum(high + 1 - (earliest + 1) // KEYS, 1)
    whole = steps
    if WINDOW:
        open_from = (gl.maximum(gl.minimum(n, earliest + TOKENS) - window, 0) + KEYS - 1) // KEYS
        whole = gl.maximum(high + 1 - open_from, masked)
    bounds = (masked, whole)

    dtype: gl.constexpr = q.dtype.element_ty
    PANEL: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_boxes = gl.allocate_shared_memory(dtype, [STAGES * PANELS * (KEYS // BOX), BOX, 64], k_source.layout)
    v_boxes = gl.allocate_shared_memory(dtype, [STAGES * PANELS * (KEYS // BOX), BOX, 64], v_source.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [2, M // 2, DIM], PANEL)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    v_zeroed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(v_zeroed, count=1)
    fence_async_shared()
    bars = (k_full, k_empty, v_full, v_empty, v_zeroed)
    k_tiles = k_boxes._reinterpret(dtype, [STAGES, KEYS, DIM], PANEL)
    v_tiles = v_boxes._reinterpret(dtype, [STAGES, KEYS, DIM], PANEL)
    gl.warp_specialize(
        [
            (_consume, (
                q, out, q_tiles.index(0), k_tiles, v_tiles, bars, scale, q_stride, window, begin, count, n, tile,
                head, steps, bounds, high, lowest, 0, KV_HEADS, GROUP, HEAD_DIM, DIM, M // 2, KEYS, STAGES, WINDOW,
            )),
            (_consume, (
                q, out, q_tiles.index(1), k_tiles, v_tiles, bars, scale, q_stride, window, begin, count, n, tile,
                head, steps, bounds, high, lowest, 1, KV_HEADS, GROUP, HEAD_DIM, DIM, M // 2, KEYS, STAGES, WINDOW,
            )),
            (_produce, (
                k_source, v_source, k_boxes, v_boxes, bars, blocks + sequence * table_stride, head, steps, high,
                lowest, n - 1, STAGES, KV_HEADS, KEYS, BLOCK_SIZE, PANELS, BOX,
            )),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def is_known(q: Tensor, cache: KVCache) -> bool:
    """Whether this kernel serves: compute capability 9.0, a release of Triton in RELEASES, a 16-bit cache."""
    if not q.is_cuda or cache.is_int8 or ".".join(triton.__version__.split(".")[:2]) not in RELEASES:
        return False
    return torch.cuda.get_device_capability(q.device) == (9, 0)


def launch_hopper(
    q: Tensor, cache: KVCache, pages: Pages, chunks: tuple[Tensor, int], scores: tuple[float, int], out: Tensor
) -> None:
    """Launch the kernel; every argument was checked by `paged_prefill`. chunks: starts and the longest; scores:
    log2(e) * scale, and the window."""
    head_dim, group = cache.head_dim, q.shape[1] // cache.kv_heads
    keys = 64 if head_dim > 128 else 128
    box = gcd(cache.block_size, keys)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    k_source, v_source = (
        TensorDescriptor.from_tensor(x.view(-1, head_dim), [box, 64], layout) for x in (cache.k, cache.v)
    )
    _prefill_hopper_kernel[(cache.kv_heads, triton.cdiv(chunks[1], ROWS // group), pages.lengths.shape[0])](
        q, k_source, v_source, pages.blocks, pages.lengths, chunks[0], out, scores[0],
        q.stride(0), pages.blocks.shape[1], scores[1],
        KV_HEADS=cache.kv_heads, GROUP=group, HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim), M=ROWS,
        KEYS=keys, BLOCK_SIZE=cache.block_size, BOX=box, STAGES=STAGES, WINDOW=scores[1] < NO_WINDOW,
        CONSUMER=CONSUMER_REGISTERS, PRODUCER=PRODUCER_REGISTERS,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
