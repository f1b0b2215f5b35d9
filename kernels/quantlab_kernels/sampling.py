"""From scores to a token on a GPU in few launches and without a sort: the greatest score, a nucleus, a draw.

Rows of a vocabulary are cut into parts so that one sequence fills the GPU too; parts are added in fixed order, so the
same input gives the same bits. What each function means is said in `ref_sampling`. Knows nothing about requests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import has_pdl, require, require_gpu

BLOCK = 512  # columns that a program of the nucleus looks at together
# A row is cut into parts of this many columns or more, and into so many that about two programs a processor run.
PART_COLUMNS, MOST_PARTS, PROGRAMS = 4096, 32, 264
# Floats from 0 to 2 are in the order of their 30 low bits; each pass over a row settles four of them, the last two.
BITS, DIGIT = 30, 4
WAYS = tl.constexpr(1 << DIGIT)
# What a row has in place of a token where its greatest score says that there is none.
NOT_FINITE, NOTHING_LEFT = tl.constexpr(-1), tl.constexpr(-2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _head_start(column, first, second):
    """-ln E of each token's exponential clock E, from 32 bits: MurmurHash3's finalizer over place and keys."""
    h = column.to(tl.uint32) * 0x9E3779B1 + first.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = h ^ second.to(tl.uint32)
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = (h ^ (h >> 16)).to(tl.int32)
    early = tl.minimum((tl.abs(h.to(tl.float32)) + 0.5) * 4.656612873077393e-10, 1.0 - 5.9604644775390625e-08)
    # -ln(1 - early): 1 - early would lose the bits of the early clocks, which decide.
    series = early * (1.0 + early * (1.0 / 2 + early * (1.0 / 3 + early * (1.0 / 4 + early * (1.0 / 5)))))
    clock = tl.where(early < 1.0 / 64, series, -tl.log(1.0 - early))
    return -tl.log(clock)


@triton.jit(do_not_specialize=["columns", "stride", "span"])
def _greatest_kernel(
    scores, keys, best, places, columns, stride, span, PARTS: tl.constexpr, WIDTH: tl.constexpr, RACE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    _wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    begin = part * span
    most = tl.full((WIDTH,), -float("inf"), tl.float32)
    at, broken = begin + lane, tl.zeros((WIDTH,), tl.int32)
    for start in tl.range(begin, tl.minimum(begin + span, columns), WIDTH):
        column = start + lane
        x = tl.load(scores + row.to(tl.int64) * stride + column, column < columns, -float("inf")).to(tl.float32)
        if RACE:
            x += _head_start(column, tl.load(keys + row * 2), tl.load(keys + row * 2 + 1))
        at = tl.where(x > most, column, at)
        most = tl.maximum(most, x)
        broken |= (x != x).to(tl.int32)
    greatest = tl.max(most, 0)
    place = tl.min(tl.where(most == greatest, at, 2147483647), 0)
    tl.store(best + row * PARTS + part, tl.where(tl.max(broken, 0) > 0, float("nan"), greatest))
    tl.store(places + row * PARTS + part, place)


@triton.jit
def _greatest_of_parts_kernel(best, places, value, token, PARTS: tl.constexpr, PDL: tl.constexpr):
    _wait(PDL)
    row = tl.program_id(0)
    part = row * PARTS + tl.arange(0, PARTS)
    x, place = tl.load(best + part), tl.load(places + part)
    broken = tl.max((x != x).to(tl.int32), 0) > 0
    greatest = tl.max(tl.where(x != x, -float("inf"), x), 0)
    tl.store(value + row, tl.where(broken, float("nan"), greatest))
    place = tl.min(tl.where(x == greatest, place, 2147483647), 0)
    tl.store(token + row, tl.where(broken, 0, place).to(tl.int64))


@triton.jit
def _settle_kernel(best, tokens, slots, last, codes, PDL: tl.constexpr):
    _wait(PDL)
    row = tl.program_id(0)
    most, code = tl.load(best + row), tl.load(tokens + row)
    code = tl.where(most == -float("inf"), NOTHING_LEFT, code)
    code = tl.where((most != most) | (most == float("inf")), NOT_FINITE, code)
    tl.store(codes + row, code)
    tl.store(last + tl.load(slots + row), tl.maximum(code, 0))


@triton.jit(do_not_specialize=["columns", "span", "step"])
def _nucleus_kernel(
    probabilities, top_p, below_in, sums_in, below_out, sums_out, columns, span, step,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # The floor of a nucleus lies above `below`, by at most 16 times the step of the pass before; its sums, the mass
    # above each of 16 limits (limit 0, `below` itself, is not asked), say in which of the 16 intervals.
    _wait(PDL)
    part, row = tl.program_id(0), tl.program_id(1)
    way = tl.arange(0, WAYS)
    below = -1
    if not FIRST:
        parts = row * PARTS * WAYS + tl.arange(0, PARTS)[:, None] * WAYS + way[None, :]
        mass = tl.sum(tl.load(sums_in + parts), 0)
        below = tl.load(below_in + row) + tl.sum(((mass >= tl.load(top_p + row)) & (way > 0)).to(tl.int32), 0) * step
    if LAST:
        tl.store(below_out + row, below + 1)
    else:
        tl.store(below_out + row, below, part == 0)
        step = step // WAYS if not FIRST else step
        limit = (below + way * tl.maximum(step, 1)).to(tl.float32, bitcast=True)
        acc = tl.zeros((WAYS, WIDTH), tl.float32)
        begin = part * span
        for start in tl.range(begin, tl.minimum(begin + span, columns), WIDTH):
            column = start + tl.arange(0, WIDTH)
            p = tl.load(probabilities + row.to(tl.int64) * columns + column, column < columns, 0.0)
            acc += tl.where(p[None, :] > limit[:, None], p[None, :], 0.0)
        tl.store(sums_out + (row * PARTS + part) * WAYS + way, tl.sum(acc, 1))


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest score of each row, fp32 [S], and its column, the first of equals, int64 [S].

    scores: [S, V] fp32, fp16 or bf16, rows may have any stride. NaN in a row makes its greatest NaN. Raises ValueError.
    """
    return _greatest(scores, None)


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The least probability in each row's nucleus: those above it have less than top_p of the probability together.

    probabilities: [S, P] fp32 in 0..1; top_p: [S] fp32, above 0. Returns [S] fp32. Raises ValueError.
    """
    _check_probabilities(probabilities, top_p, torch.float32, "top_p")
    rows, columns = probabilities.shape
    # Not one tensor in two halves: Triton compiles again for addresses that are no multiple of 16.
    below = [torch.empty(rows, dtype=torch.int32, device=probabilities.device) for _ in range(2)]
    if rows == 0:
        return below[0].view(torch.float32)
    parts, pdl = _parts(rows, columns), has_pdl(probabilities)
    span = triton.cdiv(triton.cdiv(columns, parts), BLOCK) * BLOCK
    sums = torch.empty(2, rows, parts, WAYS.value, dtype=torch.float32, device=probabilities.device)
    passes = triton.cdiv(BITS, DIGIT)
    for i in range(passes + 1):
        # The step of the pass before, which this one ends by; of the first, its own.
        step = max(1 << BITS >> DIGIT * max(i, 1), 1)
        grid = (1 if i == passes else parts, rows)
        _nucleus_kernel[grid](
            probabilities, top_p, below[1 - i % 2], sums[1 - i % 2], below[i % 2], sums[i % 2], columns, span, step,
            PARTS=parts, WIDTH=BLOCK, FIRST=i == 0, LAST=i == passes, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return below[passes % 2].view(torch.float32)


def race(scores: Tensor, keys: Tensor) -> Tensor:
    """A token a row, int64 [S], drawn with the probabilities softmax(scores) by a race of exponential clocks.

    scores: [S, P] fp32, rows may have any stride, -inf for tokens that cannot come; keys: [S, 2] int32: a token's clock
    is a function of its row's keys and its place. NaN in a row makes its token 0. Raises ValueError.
    """
    fits = keys.shape == (scores.shape[0], 2) and keys.dtype == torch.int32 and keys.device == scores.device
    require(scores.dtype == torch.float32, f"scores are {scores.dtype}; torch.float32 is due")
    require(fits and keys.is_contiguous(), "keys must be contiguous [S, 2] int32 beside the scores")
    return _greatest(scores, keys)[1]


def settle(best: Tensor, tokens: Tensor, slots: Tensor, last: Tensor) -> Tensor:
    """The rows' tokens, or NOTHING_LEFT where the greatest score is -inf and NOT_FINITE where it is NaN or inf.

    best: [S] fp32; tokens, slots: [S] int64; last: [slots] int64, which gets each row's token at its slot, 0 where
    there is none. Returns [S] int64. Raises ValueError.
    """
    fits = best.dtype == torch.float32 and all(x.dtype == torch.int64 for x in (tokens, slots, last))
    require(fits and last.dim() == 1, "best must be fp32, tokens, slots and last int64")
    for x in (best, tokens, slots):
        require(x.shape == tokens.shape and x.dim() == 1 and x.is_contiguous(), "best, tokens and slots must be [S]")
        require(x.device == last.device, "best, tokens, slots and last must be on one device")
    require_gpu("best", best, "ref_sampling")
    codes = torch.empty_like(tokens)
    if len(codes):
        pdl = has_pdl(best)
        _settle_kernel[(len(codes),)](best, tokens, slots, last, codes, PDL=pdl, num_warps=1, launch_pdl=pdl)
    return codes


def warm_sampling(columns: int, rows: int, scores: torch.dtype, device: torch.device) -> int:
    """Launch every kernel that up to `rows` rows of `columns` columns (padded to 512 for a race) need; returns for how
    many numbers of rows that took. scores: the dtype that `greatest` will be given."""
    shapes: dict[int, int] = {}
    for count in range(1, rows + 1):
        shapes.setdefault(_parts(count, columns), count)
    for count in shapes.values():
        probabilities = torch.zeros(count, triton.cdiv(columns, BLOCK) * BLOCK, device=device)
        best, tokens = greatest(probabilities[:, :columns].to(scores))
        settle(best, tokens, tokens, torch.zeros(columns, dtype=torch.int64, device=device))
        greatest(probabilities)
        nucleus_floor(probabilities, probabilities.new_ones(count))
        race(probabilities, torch.zeros(count, 2, dtype=torch.int32, device=device))
    return len(shapes)


def _greatest(scores: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """The greatest of each row and its column; with `keys`, of what its clocks make of the scores."""
    require(
        scores.dim() == 2 and scores.shape[1] > 0 and scores.stride(1) == 1, "scores must be [S, V], rows contiguous"
    )
    require(scores.dtype in FLOATS, f"scores are {scores.dtype}; a float is due")
    require_gpu("scores", scores, "ref_sampling")
    rows, columns = scores.shape
    value = torch.empty(rows, dtype=torch.float32, device=scores.device)
    token = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if rows:
        parts, pdl = _parts(rows, columns), has_pdl(scores)
        span = triton.cdiv(triton.cdiv(columns, parts), 1024) * 1024
        best = torch.empty(rows, parts, dtype=torch.float32, device=scores.device)
        places = torch.empty(rows, parts, dtype=torch.int32, device=scores.device)
        _greatest_kernel[(parts, rows)](
            scores, keys, best, places, columns, scores.stride(0), span, PARTS=parts, WIDTH=1024,
            RACE=keys is not None, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
        _greatest_of_parts_kernel[(rows,)](
            best, places, value, token, PARTS=parts, PDL=pdl, num_warps=1, launch_pdl=pdl
        )  # fmt: skip
    return value, token


def _parts(rows: int, columns: int) -> int:
    """Parts of a row, a power of two."""
    wanted = min(triton.cdiv(PROGRAMS, rows), triton.cdiv(columns, PART_COLUMNS), MOST_PARTS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _check_probabilities(probabilities: Tensor, other: Tensor, dtype: torch.dtype, name: str) -> None:
    known = probabilities.dim() == 2 and probabilities.dtype == torch.float32 and probabilities.is_contiguous()
    require(known and probabilities.shape[1] > 0, "probabilities must be contiguous [S, P] fp32")
    fits = other.shape == probabilities.shape[:1] and other.dtype == dtype and other.device == probabilities.device
    require(fits and other.is_contiguous(), f"{name} must be contiguous [S] {dtype} beside the probabilities")
    require_gpu("probabilities", probabilities, "ref_sampling")
