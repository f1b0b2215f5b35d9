"""Finds the fastest W8A8 tile for each number of tokens on this GPU and writes the data file that launches read.

Candidates are checked against the exact integer product, then timed on weights that no cache holds. Knows nothing about
what the winners are for.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from quantlab.bench.gpu_timing import Work, copies_to_stay_cold, graph_times, relative_rmse
from quantlab_kernels.w4a16 import processors
from quantlab_kernels.w8a8 import choose_tile, prepare, prepare_quantize, quantize_tokens, run
from quantlab_kernels.w8a8_layout import W8A8Weight
from quantlab_kernels.w8a8_tiles import OneTokenTile, Tile, WgmmaTile, likely_tile

# Consumer warps, row blocks, programs a processor.
NARROW = ((4, 1, 5), (4, 1, 4), (4, 1, 3), (4, 1, 2), (8, 1, 2), (4, 2, 2))
WIDE = ((4, 1, 2), (4, 2, 2), (8, 1, 1), (8, 2, 1))
ONE_TOKEN = ((8, 1024, 4), (4, 1024, 4), (8, 512, 4), (4, 512, 4), (4, 512, 2), (8, 1024, 8))
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
ACCUMULATORS = 128  # a thread


class Int8Layer:
    """A random INT8 weight [N, K], in copies enough that each is read from memory, and what it should give."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        self.dtype = dtype
        copies = copies_to_stay_cold(rows * columns)
        self.weights = [_random(rows, columns) for _ in range(copies)]
        self.dense = self.weights[0].codes.float() * self.weights[0].scales[:, None]

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random x [M, K], its codes and scales, and what their product with the first copy is in float32."""
        x = torch.randn(count, self.dense.shape[1], device="cuda").to(self.dtype)
        codes, scales = quantize_tokens(x)
        return x, codes, scales, (codes.float() * scales[:, None]) @ self.dense.t()


def candidates(rows: int, columns: int, tokens: int, slots: int) -> Iterator[Tile]:
    """Tiles worth timing for [tokens, columns] x [rows, columns]^T on a GPU of `slots` processors."""
    if tokens == 1:
        yield from (OneTokenTile(*shape) for shape in ONE_TOKEN)
    width = max(8, 1 << (tokens - 1).bit_length())
    widths = (width,) if width <= 64 else (64, 128) if width == 128 else (64, 128, 256)
    for wide in widths:
        for warps, row_blocks, resident in NARROW if wide <= 64 else WIDE:
            for chunks in (1, 2) if wide <= 64 else (1,):
                tile = WgmmaTile(warps, row_blocks, wide, chunks, 1, resident)
                if tile.stages >= 3 and row_blocks * wide // 2 <= ACCUMULATORS:
                    yield from _splits(tile, rows, columns, tokens, slots)


def _splits(tile: WgmmaTile, rows: int, columns: int, tokens: int, processors: int) -> Iterator[Tile]:
    """`tile` with K whole, with as many parts as fill the GPU or half of it, and shared evenly."""
    tiles, slots = -(-rows // tile.rows) * -(-tokens // tile.tokens), processors * tile.resident
    stages = -(-columns // (128 * tile.chunks))
    most = max(1, min(8, slots // tiles, stages // 2))
    yield from (replace(tile, split=split) for split in sorted({1, most, max(1, most // 2)}))
    if tiles % slots and tiles * stages >= 2 * slots and tokens > 64:
        yield replace(tile, split=0)


def error_of(layer: Int8Layer, count: int, tile: Tile | None) -> float:
    """Relative RMSE against the exact product; RuntimeError if it is too large or a second run gives other bits."""
    _, codes, scales, reference = layer.tokens(count)
    outs = [torch.full_like(reference, math.nan, dtype=layer.dtype) for _ in range(2)]
    for out in outs:
        run(codes, scales, layer.weights[0], None, out, tile, early=True)
    torch.cuda.synchronize()
    error = relative_rmse(outs[0], reference)
    if not error < TOLERANCE[layer.dtype]:
        raise RuntimeError(f"relative error {error:.3g}")
    if not torch.equal(outs[0], outs[1]):
        raise RuntimeError("two runs differ")
    return error


def work_of(layer: Int8Layer, count: int, tile: Tile | None, quantized: bool, early: bool = True) -> Work:
    """One product on INT8 tokens, or (not quantized) making them and the product."""
    x, codes, scales, _ = layer.tokens(count)
    out = torch.empty(count, layer.dense.shape[0], dtype=layer.dtype, device="cuda")

    def enqueue(i: int) -> None:
        if not quantized:
            kernel, grid, arguments, options = prepare_quantize(x, codes, scales, early)
            kernel[grid](*arguments, **options)
        run(codes, scales, layer.weights[i], None, out, tile, early)

    return Work(enqueue, len(layer.weights), 48 if count <= 256 else 8)


def compile_candidates(rows: int, columns: int, dtype: torch.dtype, tokens: list[int], workers: int) -> None:
    """Compile, in threads, every candidate for these numbers of tokens."""
    jobs: dict[tuple[Tile, bool], tuple[int, Tile]] = {}
    slots = processors(torch.device("cuda", torch.cuda.current_device()))
    for count in tokens:
        tiles = {*candidates(rows, columns, count, slots)}
        jobs |= {(tile, count == 1): (count, tile) for tile in tiles}
    weight = _random(rows, columns)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _compile(weight, dtype, *job), jobs.values()))


def compile_chosen(rows: int, columns: int, dtype: torch.dtype, tokens: Sequence[int], workers: int) -> None:
    """Compile, in threads, what these numbers of tokens run with, and the same without an early start."""
    weight = _random(rows, columns)
    jobs = {(choose_tile(weight, count), count == 1, early): count for count in tokens for early in (True, False)}
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _compile(weight, dtype, job[1], job[0][0], job[0][2]), jobs.items()))


def tune_layer(layer: Int8Layer, count: int, processors: int) -> Tile:
    """The tile with which quantizing and multiplying this many tokens is fastest."""
    rows, columns = layer.dense.shape
    tiles = list({likely_tile(rows, columns, count, (OneTokenTile, WgmmaTile), processors),
                  *candidates(rows, columns, count, processors)})  # fmt: skip
    for tile in tiles:
        error_of(layer, count, tile)
    timings = graph_times([work_of(layer, count, tile, quantized=False) for tile in tiles])
    return min(zip(timings, tiles, strict=True), key=lambda pair: pair[0].median)[1]


def _compile(weight: W8A8Weight, dtype: torch.dtype, count: int, tile: Tile, early: bool = True) -> None:
    codes = torch.empty(count, weight.in_features, dtype=torch.int8, device="cuda")
    out = torch.empty(count, weight.out_features, dtype=dtype, device="cuda")
    scales = torch.empty(count, device="cuda")
    kernel, grid, arguments, options = prepare(codes, scales, weight, None, out, tile, early)
    kernel.warmup(*arguments, grid=grid, **options)


def _random(rows: int, columns: int) -> W8A8Weight:
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device="cuda")
    return W8A8Weight(codes, (torch.rand(rows, device="cuda") + 0.5) / 64 / columns**0.5)
