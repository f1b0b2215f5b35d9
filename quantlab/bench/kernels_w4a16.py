"""W4A16 linears on one GPU against cuBLAS bf16 and the bytes they must move: `make bench-kernels`.

One JSON line for each layer and number of tokens, ceilings first, the error beside every time; sums over the four
layers of an 8B model in a table at the end. cuBLAS is timed on gaussian weights, which a 16-bit model has, and on the
very weights of the 4-bit layer: these have few distinct values, cost less power, and run faster.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.bench.gpu_state import State
from quantlab.bench.gpu_timing import Ceilings, Work, copies_to_stay_cold, environment, graph_times, measure_ceilings
from quantlab.bench.tune_w4a16 import Layer, candidates, error_of, tune_layer, work_of, write_tiles
from quantlab_kernels.w4a16 import choose_tile, processors
from quantlab_kernels.w4a16_compile import Product, compile_in_parallel
from quantlab_kernels.w4a16_tiles import MEASURED, Tile, tile_to_json

# (N, K) of an 8B model of Llama 3's shapes.
LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
DENSE = (2, 4, 12, 17, 24, 33, 48, 65, 80, 97, 112, 129, 160, 193, 224, 257, 320, 384, 448, 513, 640, 768, 896, 1152,
         1280, 1536, 1792, 2048, 3072, 6144, 8192)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TUNED = (8, 16, 32, 64, 96, 128, 144, 160, 192, 256, 272, 288, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1152, 1280,
         1536, 1792, 2048)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One layer at one number of tokens, times in microseconds; `alone` is without overlap with the kernel before."""

    layer: str
    tokens: int
    dtype: str
    us: float
    alone: float | None
    error: float
    floor: float
    cublas: float
    cublas_same_weights: float | None
    tile: dict[str, Any]
    state: State | None


class Bench:
    """The rows of one layer in one dtype."""

    def __init__(self, name: str, dtype: str, ceilings: Ceilings):
        rows, columns = LAYERS[name]
        self.name, self.dtype, self.ceilings = name, dtype, ceilings
        self.layer = Layer(rows, columns, DTYPES[dtype])
        copies = range(copies_to_stay_cold(rows * columns * 2))
        self.same = [self.layer.dense.to(torch.bfloat16) for _ in copies]
        self.gaussian = [torch.randn_like(self.same[0]) * 0.03 for _ in copies]

    def row(self, tokens: int, whole: bool) -> Row:
        """Measure one row, all of it or what a dense sweep needs.

        Raises RuntimeError if the product is wrong or differs from run to run.
        """
        x, reference = self.layer.tokens(tokens)
        tile = tile_of(*LAYERS[self.name], tokens)
        launches = 48 if tokens <= 256 else 8
        error = error_of(self.layer, x, reference, None)
        wide = x.to(torch.bfloat16)
        works = [work_of(self.layer, x, None, launches), self._cublas(wide, self.gaussian, launches)]
        if whole:
            works += [work_of(self.layer, x, None, launches, early=False), self._cublas(wide, self.same, launches)]
        timings = graph_times(works)
        us, cublas, *rest = (timing.median for timing in timings)
        alone, same = rest or (None, None)
        floor, state = self.floor(tokens), timings[0].state
        return Row(self.name, tokens, self.dtype, us, alone, error, floor, cublas, same, tile_to_json(tile), state)

    def floor(self, tokens: int) -> float:
        """Microseconds that bytes or arithmetic need at the ceilings of this run."""
        rows, columns = LAYERS[self.name]
        nbytes = self.layer.weights[0].nbytes + 2 * tokens * (rows + columns)
        rate = max(self.ceilings.copy_tbs, self.ceilings.read_tbs)
        return max(nbytes / rate, 2 * tokens * rows * columns / self.ceilings.matmul_tflops) * 1e-6

    def _cublas(self, x: Tensor, weights: list[Tensor], launches: int) -> Work:
        out = torch.empty(x.shape[0], weights[0].shape[0], dtype=x.dtype, device=x.device)
        return Work(lambda i: torch.mm(x, weights[i].t(), out=out), len(weights), launches)


def tile_of(rows: int, columns: int, tokens: int) -> Tile:
    """The tile that a product runs with on this GPU."""
    return choose_tile(rows, columns, tokens, torch.device("cuda", torch.cuda.current_device()))


def compile_all(tokens: Sequence[int], dtypes: Sequence[str], workers: int) -> None:
    """Compile in parallel what the rows will launch; raises RuntimeError with the reason if something does not."""
    jobs: dict[tuple[Tile, str, bool], Product] = {}
    for (rows, columns), count, dtype, early in product(LAYERS.values(), tokens, dtypes, (True, False)):
        tile = tile_of(rows, columns, count)
        jobs[tile, dtype, early] = Product(rows, columns, count, tile, DTYPES[dtype], early=early)
    _must_compile(jobs.values(), workers)


def tune(dtype: str, workers: int, path: Path) -> None:
    """Measure every candidate for each layer and number of tokens in TUNED, and write the winners to the data file."""
    device = torch.device("cuda", torch.cuda.current_device())
    tiles = {
        t: (shape, m) for shape in LAYERS.values() for m in TUNED for t in candidates(*shape, m, processors(device))
    }
    _must_compile([Product(*shape, m, tile, DTYPES[dtype]) for tile, (shape, m) in tiles.items()], workers)
    winners = {}
    for name, (rows, columns) in LAYERS.items():
        layer = Layer(rows, columns, DTYPES[dtype])
        winners[rows, columns] = [(m, tile_to_json(tune_layer(layer, m, processors(device)))) for m in TUNED]
        print(name, winners[rows, columns], file=sys.stderr)
    write_tiles(path, torch.cuda.get_device_name(device), winners)


def table(rows: Sequence[Row]) -> str:
    """Sums over the four layers by dtype and number of tokens, where all four were measured."""
    lines = ["dtype     M       us    alone    floor    %   cuBLAS  ratio   same w error   MHz"]
    for key in dict.fromkeys((row.dtype, row.tokens) for row in rows):
        group = [row for row in rows if (row.dtype, row.tokens) == key]
        if len(group) < len(LAYERS):
            continue
        us, alone, floor, cublas, same = (sum(getattr(row, name) or 0 for row in group) for name in _SUMMED)
        lines.append(
            f"{key[0]:5} {key[1]:5} {us:8.1f} {alone:8.1f} {floor:8.1f} {100 * floor / us:4.0f} {cublas:8.1f} "
            f"{cublas / us:6.2f} {same:8.1f} {max(row.error for row in group):.1e} "
            f"{min(row.state.sm_mhz if row.state else 0 for row in group):5}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a JSON line a row, append them to --out, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dense", action="store_true", help="many more numbers of tokens, in bf16")
    parser.add_argument("--tune", action="store_true", help="measure all tiles first and write the data file")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--workers", type=int, default=16, help="processes that compile")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("these benches need a GPU")
    if options.tune:
        tune(options.dtypes[0], options.workers, MEASURED)
    more = tuple(count for count in DENSE if count not in options.tokens) if options.dense else ()
    compile_all((*options.tokens, *more), options.dtypes, options.workers)
    ceilings = measure_ceilings()
    facts = environment()
    _emit({"ceilings": asdict(ceilings), **facts}, options.out)
    rows = []
    for name, dtype in product(LAYERS, options.dtypes):
        bench = Bench(name, dtype, ceilings)
        # Ascending: no row of few tokens follows one that drew all the power there is.
        for count in sorted((*options.tokens, *(more if dtype == "bf16" else ()))):
            rows.append(bench.row(count, whole=count in options.tokens))
            _emit({"op": "w4a16", **asdict(rows[-1]), **facts}, options.out)
    print(table(rows))


_SUMMED = ("us", "alone", "floor", "cublas", "cublas_same_weights")


def _must_compile(products: Iterable[Product], workers: int) -> None:
    major, minor = torch.cuda.get_device_capability()
    failed = compile_in_parallel(products, 10 * major + minor, workers)
    for description, reason in failed.items():
        raise RuntimeError(f"{description}: {reason}")


def _emit(row: dict[str, Any], path: Path | None) -> None:
    line = json.dumps(row)
    if path is None:
        print(line, file=sys.stderr)
        return
    with path.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
