"""Finds the fastest W4A16 tile for each number of tokens on this GPU and writes the data file that launches read.

Candidates are compiled in parallel, checked against float32, then timed on weights that no cache holds. Knows nothing
about what the winners are for.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.bench.gpu_timing import Work, copies_to_stay_cold, graph_times, relative_rmse
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize
from quantlab_kernels.rows import empty_rows
from quantlab_kernels.w4a16 import run
from quantlab_kernels.w4a16_heuristic import large_tiles
from quantlab_kernels.w4a16_layout import W4A16Weight, to_kernel
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, Tile

# Consumer warps, row blocks, programs a processor: what registers and shared memory allow at all.
STRUCTURES = ((4, 1, 5), (4, 1, 4), (4, 1, 3), (4, 1, 2), (8, 1, 3), (8, 1, 2), (8, 1, 1), (8, 2, 1), (16, 1, 1))
MISJUDGED = 1.3  # how much longer than the best by the rule a tile may take by it and be timed all the same
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Layer:
    """A random 4-bit weight [N, K], in copies enough that each is read from memory, and what it should give."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, group_size: int = 128, zeros: bool = False):
        groups = (rows, columns // group_size)
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
        scales = ((torch.rand(groups, device="cuda") + 0.5) * 0.01).to(dtype)
        offsets = torch.randint(-8, 8, groups, dtype=torch.int8, device="cuda") if zeros else None
        quantized = QuantizedWeight(codes, scales, offsets, group_size)
        self.dense = dequantize(quantized)
        weight = to_kernel(quantized, dtype)
        copies = copies_to_stay_cold(weight.nbytes)
        self.weights = [weight, *(_clone(weight) for _ in range(copies - 1))]

    def tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Random x [M, K] and x W^T in float32."""
        x = empty_rows(count, self.dense.shape[1], self.dense.dtype, self.dense.device).normal_()
        return x, x.float() @ self.dense.float().t()


def candidates(rows: int, columns: int, tokens: int, processors: int) -> Iterator[Tile]:
    """Tiles worth timing for [tokens, columns] x [rows, columns]^T."""
    if tokens > 128:
        likely = large_tiles(rows, columns, tokens, processors)
        yield from (tile for microseconds, tile in likely if microseconds < MISJUDGED * likely[0][0])
        return
    if tokens <= 16:
        yield from _decode_candidates(rows, columns, tokens, processors)
    width = max(8, 1 << (tokens - 1).bit_length())
    widths = [(width, 0)]
    if tokens <= 3 * width // 4 and width >= 32:
        widths.append((width // 2, width // 4))
    for main, more in widths:
        for warps, row_blocks, resident in STRUCTURES:
            for chunks in (2, 4):
                tile = GluonTile(warps, row_blocks, main, more, chunks, 1, resident)
                yield from _gluon_candidates(tile, rows, columns, tokens, processors)


def _decode_candidates(rows: int, columns: int, tokens: int, processors: int) -> Iterator[Tile]:
    for warps in (4, 8, 16):
        for row_tiles in (1, 2, 4):
            for split in (1, 2, 4, 8):
                tile = DecodeTile(warps, row_tiles, 8 if tokens <= 8 else 16, split)
                programs = -(-rows // (16 * row_tiles)) * split
                steps = columns / (128 * warps * split)
                if (
                    0.9 * processors <= programs <= 32 * processors
                    and steps >= 1
                    and programs * warps <= 40 * processors
                ):
                    yield tile


def _gluon_candidates(tile: GluonTile, rows: int, columns: int, tokens: int, processors: int) -> Iterator[Tile]:
    """`tile` with the numbers of programs along K that fill the GPU best, or half of it.

    Half, because the next kernel's programs then have room to start and to read their weights meanwhile.
    """
    accumulators = (tile.row_blocks * tile.tokens + tile.more_tokens) // 2
    consumers = (tile.registers * (tile.warps // 4 + 1) - 24) // (tile.warps // 4)
    if accumulators + 64 > consumers or tile.stages() < 3 or (tile.more_tokens and tile.row_blocks == 2):
        return
    tiles = -(-rows // tile.rows) * -(-tokens // tile.columns)
    slots = processors * tile.resident
    fills = []
    for split in range(1, 17):
        programs = tiles * split
        if split > 1 and (programs > slots or columns // (64 * tile.chunks * split) < 2):
            break
        fills.append((-programs / (slots * math.ceil(programs / slots)), split))
    best = {split for fill, split in sorted(fills)[:2] if fill < -0.55 or split == 1}
    if tokens <= 64 and tile.resident > 1:
        best |= {split for _, split in sorted((abs(fill + 0.5), split) for fill, split in fills)[:1]}
    for split in sorted(best):
        yield replace(tile, split=split)


def error_of(layer: Layer, x: Tensor, reference: Tensor, tile: Tile | None) -> float:
    """Relative RMSE with a tile, or as linears run.

    Raises RuntimeError if it is too large, or if a second run gives other bits.
    """
    outs = [torch.full_like(reference, math.nan, dtype=x.dtype) for _ in range(2)]
    for out in outs:
        run(x, layer.weights[0], None, out, tile, early=True)
    torch.cuda.synchronize()
    error = relative_rmse(outs[0], reference)
    if not error < TOLERANCE[x.dtype]:
        raise RuntimeError(f"relative error {error:.3g}")
    if not torch.equal(outs[0], outs[1]):
        raise RuntimeError("two runs differ")
    return error


def work_of(layer: Layer, x: Tensor, tile: Tile | None, launches: int = 48, early: bool = True) -> Work:
    """One product with a tile, or as linears run it."""
    out = torch.empty(x.shape[0], layer.dense.shape[0], dtype=x.dtype, device=x.device)
    weights = layer.weights
    return Work(lambda i: run(x, weights[i], None, out, tile, early), len(weights), launches)


def tune_layer(layer: Layer, tokens: int, processors: int) -> Tile:
    """The fastest right tile for this many tokens; raises RuntimeError naming the first wrong one."""
    x, reference = layer.tokens(tokens)
    rows, columns = layer.dense.shape
    tiles = list(candidates(rows, columns, tokens, processors))
    for tile in tiles:
        error_of(layer, x, reference, tile)
    timings = graph_times([work_of(layer, x, tile) for tile in tiles])
    return min(zip(timings, tiles, strict=True), key=lambda pair: pair[0].median)[1]


def write_tiles(path: Path, gpu: str, winners: Mapping[tuple[int, int], Sequence[tuple[int, Any]]]) -> None:
    """Put the winners, (N, K) -> (tokens, tile as JSON), of one GPU in the data file; those of other GPUs stay."""
    kept = [entry for entry in json.loads(path.read_text()) if entry["gpu"] != gpu]
    for (rows, columns), tiles in sorted(winners.items()):
        listed = [list(pair) for pair in sorted(tiles, key=lambda pair: pair[0])]
        kept.append({"gpu": gpu, "rows": rows, "columns": columns, "tiles": listed})
    lines = ",\n".join(json.dumps(entry) for entry in kept)
    path.write_text(f"[\n{lines}\n]\n")


def _clone(weight: W4A16Weight) -> W4A16Weight:
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return replace(weight, words=weight.words.clone(), scales=weight.scales.clone(), zeros=zeros)
