"""Compiles the kernels of linears that a model will launch before it serves, and counts what is compiled later.

Triton compiles a kernel at its first launch, which takes a second in the middle of someone's request. Knows nothing
about models: it is given weights and numbers of tokens.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from quantlab_kernels import w8a8
from quantlab_kernels.w4a16 import choose_tile, prepare, programmatic
from quantlab_kernels.w4a16_layout import W4A16Weight
from quantlab_kernels.w4a16_tiles import Tile
from quantlab_kernels.w8a8_layout import W8A8Weight
from quantlab_kernels.w8a8_tiles import Tile as W8A8Tile


def token_counts(most: int) -> list[int]:
    """Numbers of tokens that between them take every tile that any number up to `most` does.

    Tiles are some multiples of 16 tokens wide, or 8, and measurements are kept by such multiples.
    """
    return sorted({1, min(8, most), *range(16, most + 1, 16), -(-most // 16) * 16}) if most else []


def warm_up(linears: Iterable[tuple[W4A16Weight, Tensor | None]], tokens: Iterable[int], workers: int = 8) -> int:
    """Compile, in `workers` threads, what the linears (weight, bias) launch for each number of tokens.

    Returns the number of kernels. Nothing is launched. Triton keeps them on disk, so that the next process only loads.
    """
    jobs: dict[tuple[Any, ...], tuple[W4A16Weight, Tensor | None, int, Tile]] = {}
    counts = sorted(count for count in set(tokens) if count)
    for weight, bias in linears:
        device = weight.words.device
        for count in counts:
            aligned = weight.in_features % 8 == 0
            tile = choose_tile(weight.out_features, weight.in_features, count, device, aligned, weight.bits)
            jobs.setdefault(_kind(weight, bias, tile), (weight, bias, count, tile))
    with ThreadPoolExecutor(workers) as pool:
        return len(list(pool.map(_compile, jobs.values())))


def warm_up_w8a8(
    linears: Iterable[tuple[W8A8Weight, Tensor | None]], tokens: Iterable[int], dtype: torch.dtype, workers: int = 8
) -> int:
    """`warm_up` for W8A8 linears (weight, bias) whose results are in `dtype`, and for the quantization of their x."""
    jobs: dict[tuple[Any, ...], tuple[W8A8Weight, Tensor | None, int, W8A8Tile | None]] = {}
    for weight, bias in linears:
        (rows, columns), device = weight.codes.shape, weight.codes.device
        for count in sorted(count for count in set(tokens) if count):
            tile = w8a8.choose_tile(weight, count)
            sizes = (columns, rows % 16 == 0, min(rows, 128), bias is None)
            jobs.setdefault((device, None, columns), (weight, bias, count, None))
            jobs.setdefault((device, tile, *sizes), (weight, bias, count, tile))
    with ThreadPoolExecutor(workers) as pool:
        return len(list(pool.map(partial(_compile_w8a8, dtype), jobs.values())))


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
    flags = (weight.zeros is None, bias is None, weight.group_size, weight.bits, weight.dtype, weight.words.device)
    return (tile, *sizes, whole, *flags)


def _compile_w8a8(dtype: torch.dtype, job: tuple[W8A8Weight, Tensor | None, int, W8A8Tile | None]) -> None:
    weight, bias, count, tile = job
    (rows, columns), device = weight.codes.shape, weight.codes.device
    x, out = (torch.empty(count, size, dtype=dtype, device=device) for size in (columns, rows))
    codes, scales = torch.empty_like(x, dtype=torch.int8), torch.empty(count, dtype=torch.float32, device=device)
    early = programmatic(device)
    if tile is None:  # the quantization of x
        _warm(device, w8a8.prepare_quantize(x, codes, scales, early))
    else:
        _warm(device, w8a8.prepare(codes, scales, weight, bias, out, tile, early))


def _compile(job: tuple[W4A16Weight, Tensor | None, int, Tile]) -> None:
    weight, bias, count, tile = job
    device = weight.words.device
    x = torch.empty(count, weight.in_features, dtype=weight.dtype, device=device)
    out = torch.empty(count, weight.out_features, dtype=weight.dtype, device=device)
    _warm(device, prepare(x, weight, bias, out, tile, programmatic(device)))


def _warm(device: torch.device, launch: w8a8.Launch) -> None:
    kernel, grid, arguments, options = launch
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # a thread begins on the first GPU
        kernel.warmup(*arguments, grid=grid, **options)
