"""How a decode step is cut into programs, and the kernel that adds what they found.

Attention over a part of the tokens leaves an output normalized by its own weights and the log2 of their sum; parts
combine exactly (FlashAttention-2, arXiv 2307.08691, section 3.1). Knows nothing about where keys and values lie.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import has_pdl

# The merge reads this many parts at most, and is compiled for these counts only.
PART_BUCKETS = (16, 64, 128)
# A window that no length reaches: attention over all tokens.
NO_WINDOW = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A grid: warps a program, tokens a step, pipeline stages, and parts that a sequence's tokens are cut into.

    early: whether it may start while the kernel before it still runs.
    """

    warps: int
    tokens: int
    stages: int
    parts: int
    early: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """What the programs of a step leave behind. output: [S * KV heads, parts, G, D] fp32; weight: that without D."""

    output: Tensor
    weight: Tensor


def plan_16bit(pairs: int, tokens: int, head_dim: int, processors: int) -> Plan:
    """The grid for 16-bit caches; pairs: (sequence, KV head) pairs, tokens: the most that one of them attends to.

    Measured on an H200: programs of four warps, two a processor, as long as that gives every pair one; beyond, programs
    of one warp with as many stages as let all of them be resident at once (a second, partial wave costs up to 1.2x).
    """
    per_processor = triton.cdiv(max(pairs, 1), processors)
    if head_dim > 128:
        return _plan(4, 32, 3, _parts(pairs, tokens, 32, 2 * processors))
    if per_processor <= 2:
        return _plan(4, 64, 5, _parts(pairs, tokens, 64, 2 * processors))
    stages = 7 if per_processor <= 4 else 5 if per_processor <= 6 else 3
    return _plan(1, 32, stages, _parts(pairs, tokens, 32, 4 * processors))


def plan_int8(pairs: int, tokens: int, head_dim: int, processors: int) -> Plan:
    """The grid for INT8 caches: about 8 warps a processor in one wave, and of such grids the one with fewest parts.

    A program's warps walk 32 tokens each, so warps are a way to cut a sequence that costs no merge.
    """
    per_pair = max(1, 8 * processors // max(pairs, 1))
    few = 2 if tokens > 8192 or pairs * tokens <= 4096 else 1
    warps = few if per_pair > 4 else 1 << (per_pair.bit_length() - 1)
    return _plan(warps, 32, 1, _parts(pairs, tokens, 32 * warps, processors * 8 // warps))


def empty_parts(pairs: int, parts: int, group: int, head_dim: int, like: Tensor) -> Parts:
    """Room for what `parts` programs of each of `pairs` leave behind."""
    output = torch.empty(pairs, parts, group, head_dim, dtype=torch.float32, device=like.device)
    return Parts(output, torch.empty(pairs, parts, group, dtype=torch.float32, device=like.device))


def _plan(warps: int, tokens: int, stages: int, parts: int) -> Plan:
    """A grid that starts early where few sequences leave the GPU half empty; a full wave would begin unevenly."""
    return Plan(warps, tokens, stages, parts, early=parts > 1)


def _parts(pairs: int, tokens: int, step: int, slots: int) -> int:
    """Parts that fill the GPU's slots once, none of them shorter than a step; past 64, adding them costs too much
    unless there are hardly any pairs."""
    most = PART_BUCKETS[-1 if pairs < 4 else -2]
    return max(1, min(slots // max(pairs, 1), triton.cdiv(tokens, step), most))


@triton.jit
def prefetch(at):
    """Fetch the lines at `at`, pointers, into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["parts"])
def _merge_kernel(
    part_output, part_weight, out, parts, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)  # sequence * query heads + head
    part, channel = tl.arange(0, MOST), tl.arange(0, DIM)
    at = (row // GROUP * parts + part) * GROUP + row % GROUP
    ok, inside = part < parts, channel < HEAD_DIM
    weight = tl.load(part_weight + at, ok, -float("inf"))
    output = tl.load(part_output + at[:, None] * HEAD_DIM + channel[None, :], ok[:, None] & inside[None, :], 0.0)
    # An empty sequence has only weights of -inf: the finite floor keeps -inf - -inf away, and 0 / tiny is 0.
    share = tl.exp2(weight - tl.maximum(tl.max(weight, 0), -1e30))
    total = tl.sum(output * share[:, None], 0) / tl.maximum(tl.sum(share, 0), 1e-30)
    tl.store(out + row * HEAD_DIM + channel, total.to(out.dtype.element_ty), inside)


def launch_merge(parts: Parts, out: Tensor) -> None:
    """Add the parts of every row in fixed order. out: [S, H, D] contiguous."""
    _, count, group, head_dim = parts.output.shape
    most = next(bucket for bucket in PART_BUCKETS if count <= bucket)
    pdl = has_pdl(out)
    _merge_kernel[(out.shape[0] * out.shape[1],)](
        parts.output, parts.weight, out, count, GROUP=group, HEAD_DIM=head_dim, DIM=triton.next_power_of_2(head_dim),
        MOST=most, PDL=pdl, num_warps=4 if most <= 64 else 8, launch_pdl=pdl,
    )  # fmt: skip
