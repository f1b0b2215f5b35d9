"""Which program makes which piece of a product in the Gluon kernels, and how the pieces of one tile become its sum.

A product is cut into tiles, a tile into stages along K. Programs first share `streamed` tiles evenly, stage by stage,
so that a program makes the end of one tile, perhaps all of others, and the beginning of one more; then each makes whole
tiles. With streamed = tiles and `split` programs a tile, that is K divided in `split` equal parts; with streamed = 0,
whole tiles alone; in between, no processor waits for the last wave of tiles.

Programs that share a tile write their sums, and the one that arrives last adds all of them in the order of K: nobody
waits for anybody, and the bits do not depend on who was last. Knows nothing about what is multiplied.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Gluon renames its functions between releases: the left name is that of Triton 3.9, the right one of 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Tiles of tokens that are handled together, block of rows by block of rows, while all their x is in the L2 cache.
TOKEN_TILES = gl.constexpr(8)


def streamed_tiles(tiles: int, split: int, slots: int) -> int:
    """How many tiles programs share: none if split is 1; all, `split` programs each; or, if 0, what evens out `slots`.

    Then a program has one to two tiles of shared work, so that few share a tile.
    """
    if split:
        return tiles if split > 1 else 0
    if tiles <= slots:
        return tiles if tiles < slots else 0
    return tiles % slots + slots if tiles % slots else 0


def program_count(tiles: int, split: int, slots: int, stages: int) -> int:
    """Programs to launch: every one has work, and no more than fit at once unless `split` says so."""
    if split > 1:
        return tiles * split
    return min(slots, tiles * stages) if split == 0 else min(slots, tiles)


@gluon.jit
def wait_for_previous_kernel(START: gl.constexpr):
    """START: let the next kernel start early. Otherwise: until the kernel before this one is done."""
    text: gl.constexpr = "griddepcontrol.launch_dependents; // $0" if START else "griddepcontrol.wait; // $0"
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def span(program, programs, tiles, streamed, stages):
    """A program's work, counted in stages: where it begins, where its share of the streamed tiles ends, and all of it.

    programs * streamed * stages is less than 2^31.
    """
    begin = program * (streamed * stages) // programs
    end = (program + 1) * (streamed * stages) // programs
    return begin, end, end + (tiles - streamed + programs - 1 - program) // programs * stages


@gluon.jit
def piece(at, end, program, programs, streamed, stages):
    """The next piece of a program that has come to `at`: the tile, its first stage, the number of stages."""
    streaming = at < end
    tile = gl.where(streaming, at // stages, streamed + program + (at - end) // stages * programs)
    first = gl.where(streaming, at % stages, 0)
    count = gl.where(streaming, gl.minimum(stages - first, end - at), stages)
    return tile, first, count


@gluon.jit
def sharers(tile, programs, streamed, stages):
    """The programs that share a streamed tile: the first one, and how many."""
    first = ((tile * stages + 1) * programs - 1) // (streamed * stages)
    last = ((tile + 1) * stages * programs - 1) // (streamed * stages)
    return first, last - first + 1


@gluon.jit
def place(tile, row_tiles, token_tiles):
    """Where a tile lies: its tile of rows and its tile of tokens.

    Bands of TOKEN_TILES tiles of tokens come one after the other, in a band all rows.
    """
    band = tile // (TOKEN_TILES * row_tiles)
    width = gl.minimum(token_tiles - band * TOKEN_TILES, TOKEN_TILES)
    within = tile % (TOKEN_TILES * row_tiles)
    return within // width, band * TOKEN_TILES + within % width


@gluon.jit
def in_order(acc, R: gl.constexpr, WARPS: gl.constexpr, BM: gl.constexpr):
    """Accumulators [16 WARPS R, BM] of WGMMA as one vector whose layout is 16 bytes a thread, side by side."""
    v = gl.permute(gl.reshape(acc, (R, WARPS, 2, 8, BM // 8, 4, 2)), (0, 4, 1, 3, 5, 2, 6))
    return gl.reshape(v, (16 * WARPS * R * BM,))


@gluon.jit
def like_accumulators(v, like, R: gl.constexpr, WARPS: gl.constexpr, BM: gl.constexpr):
    """The inverse of `in_order`; layout and shape of `like`."""
    v = gl.permute(gl.reshape(v, (R, BM // 8, WARPS, 8, 4, 2, 2)), (0, 2, 5, 3, 1, 4, 6))
    return gl.convert_layout(gl.reshape(v, (16 * WARPS * R, BM)), like.type.layout, assert_trivial=True)


@gluon.jit
def sum_partials(partials, first, parts, i, SPLIT: gl.constexpr, STRIDE: gl.constexpr):
    """The sums that programs `first` to first + parts - 1 left, added in order. i: the elements to add."""
    if SPLIT:
        at = partials + first * STRIDE + i
        v = gl.load(at, cache_modifier=".cg")
        for j in gl.static_range(1, SPLIT):
            v += gl.load(at + j * STRIDE, cache_modifier=".cg")
    else:
        v = gl.load(partials + (2 * first + 1) * STRIDE + i, cache_modifier=".cg")
        for j in range(1, parts):
            v += gl.load(partials + 2 * (first + j) * STRIDE + i, cache_modifier=".cg")
    return v


@gluon.jit
def meet(sum0, sum1, partials, counters, tile, first_stage, program, programs, streamed, stages, R: gl.constexpr,
         WARPS: gl.constexpr, BM: gl.constexpr, BMS: gl.constexpr, TWO: gl.constexpr,
         SPLIT: gl.constexpr):  # fmt: skip
    """Leave a program's sums of its part of `tile` for the last to arrive; returns whether that is this one, all sums.

    sum0: [16 WARPS R, BM], sum1 if TWO: [16 WARPS R, BMS]. SPLIT: programs a tile, or 0 for streams, in which a program
    has a place for the tile that it begins and one for the tile that it ends. counters: zero, and zero again after.
    """
    SIZE: gl.constexpr = 16 * WARPS * R * BM
    STRIDE: gl.constexpr = SIZE + (16 * WARPS * R * BMS if TWO else 0)
    first, parts = sharers(tile, programs, streamed, stages)
    begins = (first_stage == 0).to(gl.int32)
    mine = program if SPLIT else 2 * program + begins
    v0 = in_order(sum0, R, WARPS, BM)
    v1 = in_order(sum1, R, WARPS, BMS)
    i0 = gl.arange(0, SIZE, layout=v0.type.layout)
    i1 = SIZE + gl.arange(0, 16 * WARPS * R * BMS, layout=v1.type.layout)
    # Of two, the second has no need to write: in streams a program begins a tile last, when the one that ends it, first
    # of all it does, has mostly come and gone.
    seen = 0
    if SPLIT == 0:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
        if begins == 1:
            seen = gl.atomic_add(counters + tile, 0, sem="acquire", scope="gpu")
    if (parts > 2) | (seen == 0):
        gl.store(partials + mine * STRIDE + i0, v0)
        if TWO:
            gl.store(partials + mine * STRIDE + i1, v1)
        barrier()
        seen = gl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    last = seen == parts - 1
    if last:
        gl.store(counters + tile, 0)
        if SPLIT == 0 and parts == 2:  # a sum of two is the same in any order
            other = partials + (2 * first + 1 + begins) * STRIDE
            v0 += gl.load(other + i0, cache_modifier=".cg")
            if TWO:
                v1 += gl.load(other + i1, cache_modifier=".cg")
        else:
            v0 = sum_partials(partials, first, parts, i0, SPLIT, STRIDE)
            if TWO:
                v1 = sum_partials(partials, first, parts, i1, SPLIT, STRIDE)
        sum0 = like_accumulators(v0, sum0, R, WARPS, BM)
        if TWO:
            sum1 = like_accumulators(v1, sum1, R, WARPS, BMS)
    return last, sum0, sum1
