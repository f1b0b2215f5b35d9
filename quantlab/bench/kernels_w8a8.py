"""W8A8 linears on one GPU against cuBLAS bf16, torch's own INT8 product and their floor.

Times are those of quantizing the tokens and multiplying, in two launches, and of the product alone; in a model the
quantization belongs to the norm or activation before it. One JSON line a layer and number of tokens, the error beside
every time. Knows nothing about models.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlab.bench.gpu_state import State
from quantlab.bench.gpu_timing import Ceilings, Work, environment, graph_times, measure_ceilings
from quantlab.bench.kernels_w4a16 import LAYERS
from quantlab.bench.tune_w4a16 import write_tiles
from quantlab.bench.tune_w8a8 import Int8Layer, compile_candidates, compile_chosen, error_of, tune_layer, work_of
from quantlab_kernels.w4a16 import processors
from quantlab_kernels.w8a8 import choose_tile
from quantlab_kernels.w8a8_tiles import MEASURED, tile_to_json

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
TUNED = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
INT_MM_TOKENS = 17  # that torch._int_mm takes at least


@dataclass(frozen=True, slots=True)
class Row:
    """One layer at one number of tokens, times in microseconds; `alone`: without overlap with the kernel before."""

    layer: str
    tokens: int
    us: float
    alone: float
    gemm: float
    error: float
    floor: float
    cublas: float
    int_mm: float | None
    tile: dict[str, Any]
    state: State | None


class Bench:
    """The rows of one layer in bf16."""

    def __init__(self, name: str, ceilings: Ceilings):
        self.name, self.ceilings = name, ceilings
        self.layer = Int8Layer(*LAYERS[name], torch.bfloat16)
        self.dense = [torch.randn(LAYERS[name], dtype=torch.bfloat16, device="cuda") * 0.03
                      for _ in range(len(self.layer.weights) // 2 + 1)]  # fmt: skip

    def row(self, tokens: int) -> Row:
        """Measure one row; raises RuntimeError if the product is wrong or differs from run to run."""
        error = error_of(self.layer, tokens, None)
        works = [work_of(self.layer, tokens, None, quantized) for quantized in (False, True)]
        works += [work_of(self.layer, tokens, None, quantized=False, early=False), *self.baselines(tokens)]
        timings = graph_times(works)
        us, gemm, alone, cublas, *rest = (timing.median for timing in timings)
        int_mm = rest[0] if rest else None
        tile, floor = tile_to_json(choose_tile(self.layer.weights[0], tokens)), self.floor(tokens)
        return Row(self.name, tokens, us, alone, gemm, error, floor, cublas, int_mm, tile, timings[0].state)

    def floor(self, tokens: int) -> float:
        """Microseconds that bytes, or arithmetic at twice the rate of bf16, need at the ceilings of this run."""
        rows, columns = LAYERS[self.name]
        nbytes = rows * columns + tokens * (columns + 2 * rows)
        rate = max(self.ceilings.copy_tbs, self.ceilings.read_tbs)
        return max(nbytes / rate, tokens * rows * columns / self.ceilings.matmul_tflops) * 1e-6

    def baselines(self, tokens: int) -> list[Work]:
        """cuBLAS in bf16, and torch._int_mm if it takes so few tokens; that has no scales and quantizes nothing."""
        x, codes, _, _ = self.layer.tokens(tokens)
        weights, launches = self.layer.weights, 48 if tokens <= 256 else 8
        works = [
            Work(lambda i: torch.mm(x, self.dense[i].t()), len(self.dense), launches),
            Work(lambda i: torch._int_mm(codes, weights[i].codes.t()), len(weights), launches),
        ]
        return works if tokens >= INT_MM_TOKENS else works[:1]


def tune(workers: int, path: Path) -> None:
    """Measure every candidate for each layer and number of tokens in TUNED, and write the winners to the data file."""
    device = torch.device("cuda", torch.cuda.current_device())
    winners = {}
    for name, (rows, columns) in LAYERS.items():
        compile_candidates(rows, columns, torch.bfloat16, list(TUNED), workers)
        layer = Int8Layer(rows, columns, torch.bfloat16)
        winners[rows, columns] = [(m, tile_to_json(tune_layer(layer, m, processors(device)))) for m in TUNED]
        print(name, winners[rows, columns], file=sys.stderr)
    write_tiles(path, torch.cuda.get_device_name(device), winners)


def table(rows: Sequence[Row]) -> str:
    """Sums over the four layers by number of tokens, where all four were measured."""
    lines = ["w8a8   M       us    alone     gemm    floor    %   cuBLAS  ratio  int_mm error   MHz"]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        group = [row for row in rows if row.tokens == tokens]
        if len(group) < len(LAYERS):
            continue
        us, alone, gemm, floor, cublas, int_mm = (sum(getattr(row, name) or 0 for row in group) for name in _SUMMED)
        lines.append(
            f"{tokens:8} {us:8.1f} {alone:8.1f} {gemm:8.1f} {floor:8.1f} {100 * floor / us:4.0f} {cublas:8.1f} "
            f"{cublas / us:6.2f} {int_mm:7.1f} {max(row.error for row in group):.1e} "
            f"{min(row.state.sm_mhz if row.state else 0 for row in group):5}"
        )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, append a JSON line a row to --out, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--tune", action="store_true", help="measure all tiles first and write the data file")
    parser.add_argument("--workers", type=int, default=16, help="threads that compile")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("these benches need a GPU")
    if options.tune:
        tune(options.workers, MEASURED)
    for shape in LAYERS.values():
        compile_chosen(*shape, torch.bfloat16, options.tokens, options.workers)
    ceilings, facts = measure_ceilings(), environment()
    emit({"ceilings": asdict(ceilings), **facts}, options.out)
    rows = []
    for name in LAYERS:
        bench = Bench(name, ceilings)
        for count in sorted(options.tokens):
            rows.append(bench.row(count))
            emit({"op": "w8a8", **asdict(rows[-1]), **facts}, options.out)
    print(table(rows))


def emit(row: dict[str, Any], path: Path | None) -> None:
    """A JSON line at the end of a file, or on stderr."""
    line = json.dumps(row)
    if path is None:
        print(line, file=sys.stderr)
        return
    with path.open("a") as file:
        file.write(line + "\n")


_SUMMED = ("us", "alone", "gemm", "floor", "cublas", "int_mm")

if __name__ == "__main__":
    main()
