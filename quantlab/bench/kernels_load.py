"""What a GPU does once when a model is loaded, and the 8-bit output head that is made then.

Rows: bytes a second of bringing packed words to the kernels' order; the head's time to be made, its error, and its time
by number of tokens against the 16-bit one; seconds to compile an 8B model's linears, from nothing and from Triton's
cache, and how many kernels serving compiles afterwards, which is none. Knows nothing about models' files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.bench.gpu_timing import Work, environment, graph_times, measure_ceilings, relative_rmse
from quantlab.bench.kernels_w4a16 import LAYERS
from quantlab.bench.kernels_w8a8 import emit
from quantlab_kernels.int8_head import int8_head
from quantlab_kernels.layout import QuantizedWeight, unpack_int4
from quantlab_kernels.w4a16 import w4a16_linear
from quantlab_kernels.w4a16_layout import W4A16Weight, to_kernel
from quantlab_kernels.w8a8 import w8a8_linear
from quantlab_kernels.w8a8_layout import W8A8Weight, to_w8a8
from quantlab_kernels.warm_up import compilations, token_counts, warm_up, warm_up_w8a8

HEAD = (128256, 4096)
HEAD_TOKENS = (1, 8, 16, 32, 64)
MOST_TOKENS = 8192
ASKED = (
    1,
    2,
    3,
    7,
    8,
    13,
    16,
    31,
    32,
    50,
    64,
    100,
    129,
    200,
    257,
    300,
    333,
    512,
    700,
    1024,
    1500,
    2048,
    3001,
    5000,
    8192,
)
Linears = list[tuple[Any, Tensor | None]]


def load_row(rows: int, columns: int) -> dict[str, Any]:
    """Gigabytes a second of packed INT4 words to codes, and of codes to the kernels' order."""
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (rows, columns // 8), dtype=torch.int32, device="cuda")
    scales = torch.rand(rows, columns // 128, device="cuda").bfloat16()
    codes = unpack_int4(words, columns)
    unpacking = _seconds(lambda: unpack_int4(words, columns))
    ordering = _seconds(lambda: to_kernel(QuantizedWeight(codes, scales, None, 128), torch.bfloat16))
    gigabytes = words.nbytes * 1e-9
    return {"op": "load", "unpack_gbs": gigabytes / unpacking, "order_gbs": gigabytes / ordering,
            "both_gbs": gigabytes / (unpacking + ordering)}  # fmt: skip


def head_rows(read_tbs: float) -> Iterator[dict[str, Any]]:
    """The 8-bit head: how long it takes to make, and each number of tokens against cuBLAS on the 16-bit one."""
    weight = torch.randn(HEAD, device="cuda", dtype=torch.bfloat16) * 0.02
    head, error = int8_head(weight)
    seconds = _seconds(lambda: int8_head(weight))
    for tokens in HEAD_TOKENS:
        x = torch.randn(tokens, HEAD[1], device="cuda").bfloat16()
        found = relative_rmse(w4a16_linear(x, head), x.float() @ weight.float().t())
        works = [Work(partial(_head, x, head), 1, 12), Work(partial(_dense_head, x, weight), 1, 12)]
        us, cublas = (timing.median for timing in graph_times(works))
        floor = (head.nbytes + 2 * tokens * sum(HEAD)) / read_tbs * 1e-6
        yield {"op": "int8_head", "tokens": tokens, "us": us, "floor": floor, "cublas": cublas, "error": found,
               "weight_error": error, "seconds_to_make": seconds}  # fmt: skip


def _head(x: Tensor, head: W4A16Weight, copy: int) -> Tensor:
    return w4a16_linear(x, head)


def _dense_head(x: Tensor, weight: Tensor, copy: int) -> Tensor:
    return torch.mm(x, weight.t())


def warm_up_row(scheme: str) -> dict[str, Any]:
    """Seconds to warm up an 8B model's linears in a process of its own, twice, with an empty cache before the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "quantlab.bench.kernels_load", "--warm-up", scheme]
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    for run in runs:
        if run.returncode:
            raise RuntimeError(run.stderr[-500:])
    cold, cached = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    return {"op": "warm_up", "scheme": scheme, "kernels": cold["kernels"], "cold_s": cold["seconds"],
            "cached_s": cached["seconds"], "compiled_later": cold["later"] + cached["later"]}  # fmt: skip


def warm_up_once(scheme: str) -> dict[str, Any]:
    """Warm up for any number of tokens, then run every linear at ASKED ones and count the compilations.

    Timed without Python's start, torch's import and the making of the weights.
    """
    linears: Linears = [(_weight(scheme, *shape), None) for shape in LAYERS.values()]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    counts = token_counts(MOST_TOKENS)
    kernels = warm_up_w8a8(linears, counts, torch.bfloat16) if scheme == "w8a8" else warm_up(linears, counts)
    seconds = time.perf_counter() - begin
    with compilations() as later:
        for weight, _ in linears:
            for tokens in ASKED:
                x = torch.randn(tokens, weight.in_features, device="cuda").bfloat16()
                w8a8_linear(x, weight) if scheme == "w8a8" else w4a16_linear(x, weight)
    torch.cuda.synchronize()
    return {"kernels": kernels, "seconds": seconds, "later": len(later)}


def _weight(scheme: str, rows: int, columns: int) -> W4A16Weight | W8A8Weight:
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
    if scheme == "w8a8":
        return to_w8a8(QuantizedWeight(codes, torch.full((rows, 1), 1e-3, device="cuda"), None, columns))
    scales = torch.full((rows, columns // 128), 1e-3, device="cuda", dtype=torch.bfloat16)
    return to_kernel(QuantizedWeight(codes, scales, None, 128), torch.bfloat16)


def _seconds(work: Callable[[], object]) -> float:
    """The second run's time, to the end of what it enqueued."""
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(words: Sequence[str] | None = None) -> None:
    """Measure every row, append it to --out and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--warm-up", choices=("w4a16", "w8a8"), help="only warm up, in this process")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("these benches need a GPU")
    if options.warm_up:
        print(json.dumps(warm_up_once(options.warm_up)))
        return
    facts, ceilings = environment(), measure_ceilings()
    read = max(ceilings.copy_tbs, ceilings.read_tbs)
    for row in (load_row(*LAYERS["gate_up"]), *head_rows(read), warm_up_row("w4a16"), warm_up_row("w8a8")):
        print(json.dumps(row))
        emit({**row, **facts}, options.out)


if __name__ == "__main__":
    main()
