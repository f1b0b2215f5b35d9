"""The small kernels on one GPU: what lies between linears, the sampler's kernels, and a GPTQ solve.

Each row is checked against plain torch before it is timed, and plain torch is timed beside it: modules, sorts and sums,
and for the solve the loop over columns. Knows nothing about models.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from quantlab.bench.gpu_timing import Work, environment, graph_times, relative_rmse
from quantlab.quant import gptq
from quantlab.quant.grid import absmax_params
from quantlab.runtime import distribution
from quantlab.runtime.distribution import padded
from quantlab.schemes import Scheme
from quantlab_kernels import fused, ref_fused, ref_sampling, sampling

HIDDEN, INTERMEDIATE, VOCABULARY, EPS = 4096, 14336, 128256, 1e-5
WRONG = 1e-2


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one operation on `rows` rows, of what it replaces where that is one, and the error or the share
    of differing results."""

    operation: str
    rows: int
    us: float
    torch_us: float | None
    error: float


def between_linears(rows: int) -> Iterator[Row]:
    """Norms and SiLU at the sizes of an 8B model, with and without quantization."""
    x, residual = (torch.randn(rows, HIDDEN, device="cuda").bfloat16() for _ in range(2))
    weight, gate_up = torch.rand(HIDDEN, device="cuda").bfloat16(), torch.randn(rows, 2 * INTERMEDIATE, device="cuda")
    gate_up = gate_up.bfloat16()
    calls: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]] = {
        "norm": (
            lambda: fused.rms_norm(x, weight, EPS, residual),
            lambda: ref_fused.rms_norm(x, weight, EPS, residual),
        ),
        "norm, quantized": (
            lambda: fused.rms_norm_quantized(x, weight, EPS, residual),
            lambda: ref_fused.rms_norm_quantized(x, weight, EPS, residual),
        ),
        "silu": (lambda: (fused.silu_mul(gate_up),), lambda: (ref_fused.silu_mul(gate_up),)),
        "silu, quantized": (lambda: fused.silu_mul_quantized(gate_up), lambda: ref_fused.silu_mul_quantized(gate_up)),
    }
    for name, (kernel, reference) in calls.items():
        yield _row(name, rows, kernel, reference)


def sampler(rows: int) -> Iterator[Row]:
    """The sampler's kernels."""
    width = padded(VOCABULARY)
    probabilities = (torch.randn(rows, width, device="cuda") * 2).softmax(-1)
    top_p = torch.full((rows,), 0.9, device="cuda")
    logs, keys = probabilities.log(), torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int32, device="cuda")
    scores = torch.randn(rows, VOCABULARY, device="cuda").bfloat16()
    yield _row("greatest", rows, lambda: sampling.greatest(scores)[:1], lambda: scores.max(-1)[:1])
    yield _row(
        "nucleus",
        rows,
        lambda: (sampling.nucleus_floor(probabilities, top_p),),
        lambda: (ref_sampling.nucleus_floor(probabilities, top_p),),
    )
    yield _row(
        "race",
        rows,
        lambda: (sampling.race(logs, keys),),
        lambda: (distribution.race(logs, keys),),
    )


def solve(rows: int, columns: int = HIDDEN) -> Row:
    """A GPTQ solve by the kernel and by the loop, in blocks of the same size; the error is the share of other codes."""
    x, w = torch.randn(2 * columns, columns, device="cuda"), torch.randn(rows, columns, device="cuda")
    scheme = Scheme("w4a16", 128)
    factor = gptq.factorize(x.t() @ x / len(x), 0.01, True)
    scales, zeros = absmax_params(w, scheme, torch.float16)

    def run() -> Tensor:
        return gptq.solve(w, factor, scales, zeros, scheme)

    us, codes = _wall(run)
    with patch.object(gptq, "_solve_block_at_once", gptq.solve_block):
        loop_us, wanted = _wall(run)
    return Row("gptq solve", rows, us, loop_us, (codes != wanted).float().mean().item())


def line(row: Row) -> str:
    """One line of the table."""
    beside = "" if row.torch_us is None else f", torch {row.torch_us:9.1f}"
    return f"{row.operation:16} {row.rows:5} rows: {row.us:8.1f} us{beside}, error {row.error:.1e}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line a row, and append JSON lines to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 64, 4096), help="of what lies between linears")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("this bench needs a GPU")
    torch.manual_seed(0)
    facts = environment()
    print(facts, flush=True)
    rows = [row for count in options.rows for row in between_linears(count)]
    rows += [row for count in (1, 64) for row in sampler(count)]
    rows.append(solve(1024))
    for row in rows:
        print(line(row), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps({"op": "small kernels", **asdict(row), **facts}) + "\n")


def _row(
    name: str, rows: int, kernel: Callable[[], tuple[Tensor, ...]], reference: Callable[[], tuple[Tensor, ...]]
) -> Row:
    """Raises RuntimeError if the first result is wrong."""
    error = relative_rmse(kernel()[0].float(), reference()[0].float())
    if not error < WRONG:
        raise RuntimeError(f"{name} is wrong: relative error {error}")
    works = [Work(lambda _: kernel(), launches=16), Work(lambda _: reference(), launches=16)]
    us, torch_us = (timing.median for timing in graph_times(works))
    return Row(name, rows, us, torch_us, error)


def _wall(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Microseconds on the host's clock, which the loop's launches keep busy, after one run to warm up."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6, result


if __name__ == "__main__":
    main()
