"""Compiles the W4A16 kernels that a model will launch before it serves, and counts what is compiled later.

Triton compiles a kernel at its first launch, which takes a second in the middle of someone's request. Knows nothing
about models: it is given weights and numbers of tokens.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from quantlab_kernels.w4a16 import choose_tile, prepare, programmatic, token_parts
from quantlab_kernels.w4a16_layout import W4A16Weight
from quantlab_kernels.w4a16_tiles import Tile


def warm_up(linears: Iterable[tuple[W4A16Weight, Tensor | None]], tokens: Iterable[int], workers: int = 8) -> int:
    """Compile, in `workers` threads, what the linears (weight, bias) launch for each number of tokens.

    Returns the number of kernels. Nothing is launched. Triton keeps them on disk, so that the next process only loads.
    """
    jobs: dict[tuple[Any, ...], tuple[W4A16Weight, Tensor | None, int, Tile]] = {}
    counts = sorted(set(tokens))
    for weight, bias in linears:
        device = weight.words.device
        for count in (part for all_tokens in counts for part in token_parts(all_tokens, device) if part):
            tile = choose_tile(weight.out_features, weight.in_features, count, device, weight.in_features % 8 == 0)
            jobs.setdefault(_kind(weight, bias, tile), (weight, bias, count, tile))
    with ThreadPoolExecutor(workers) as pool:
        return len(list(pool.map(_compile, jobs.values())))


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the kernels that this process compiles, or loads for the first time, while the block runs."""
    names: list[str] = []

    def note(key: str, repr: str, fn: Any, compile: Any, is_manual_warmup: bool, already_compiled: bool) -> None:
        names.append(fn.name)

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def _kind(weight: W4A16Weight, bias: Tensor | None, tile: Tile) -> tuple[Any, ...]:
    """What tells two launches' kernels apart: their constants, and what Triton or a launch looks at in sizes."""
    sizes = (weight.out_features % 16 == 0, min(weight.out_features, 128), weight.in_features % 16 == 0)
    whole = weight.in_features % 2048  # in the mma.sync kernel the warps of a program may divide K evenly or not
    flags = (weight.zeros is None, bias is None, weight.group_size, weight.dtype, weight.words.device)
    return (tile, *sizes, whole, *flags)


def _compile(job: tuple[W4A16Weight, Tensor | None, int, Tile]) -> None:
    weight, bias, count, tile = job
    device = weight.words.device
    x = torch.empty(count, weight.in_features, dtype=weight.dtype, device=device)
    out = torch.empty(count, weight.out_features, dtype=weight.dtype, device=device)
    kernel, grid, arguments, options = prepare(x, weight, bias, out, tile, programmatic(device))
    with torch.cuda.device(device) if weight.words.is_cuda else nullcontext():  # a thread begins on the first GPU
        kernel.warmup(*arguments, grid=grid, **options)
