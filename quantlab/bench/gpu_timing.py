"""Times GPU work: replays of a captured CUDA graph over rotating operands, and the ceilings to hold them against.

Every kernel bench times through `graph_time`, prints `relative_rmse` beside each time, and takes its percentages from
`measure_ceilings` of the same run. Knows nothing about any one kernel.
"""

import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

# A replay must find its operands in memory, not in a cache: the copies together outweigh an L2 of 60 MB 4 times.
COLD_BYTES = 256_000_000
# Clocks are up when a stretch of this many seconds brings no faster replay than the one before it, or after so many.
WARM_SECONDS, MOST_STRETCHES = 0.02, 15
NO_FASTER = 0.985


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a launch: the median of the replays, the fastest and the slowest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this GPU reached in this run: bytes copied (read + written) and read, in TB/s; bf16 matmul, in TFLOP/s."""

    copy_tbs: float
    read_tbs: float
    matmul_tflops: float


def copies_to_stay_cold(nbytes: int) -> int:
    """How many copies of an operand of `nbytes` to rotate through, so that each is read from memory."""
    return COLD_BYTES // nbytes + 1


def graph_time(enqueue: Callable[[int], object], copies: int, launches: int = 48, replays: int = 5) -> Timing:
    """Time `enqueue(i)`, which enqueues work on copy `i` of its operands on the current stream.

    At least `launches` calls, a whole number of rounds over the copies, make one graph; what it allocates stays in it.
    """
    rounds = -(-launches // copies)
    order = [i for _ in range(rounds) for i in range(copies)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in order[:2]:
            enqueue(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in order:
            enqueue(i)
    settle(lambda: _replay_time(graph))
    times = sorted(_replay_time(graph) / len(order) for _ in range(replays))
    return Timing(times[len(times) // 2], times[0], times[-1])


def settle(replay: Callable[[], float]) -> int:
    """Call `replay`, which returns how long it took, until it gets no faster; returns the number of calls.

    After idling, the first milliseconds of work run up to 1.5 times slower, and how many there are depends on how long
    the GPU was idle: loading a kernel for a second costs more of them than drawing an operand.
    """
    calls, before = 0, math.inf
    for _ in range(MOST_STRETCHES):
        best, end = math.inf, time.perf_counter() + WARM_SECONDS
        while best == math.inf or time.perf_counter() < end:
            best = min(best, replay())
            calls += 1
        if best > NO_FASTER * before:
            break
        before = best
    return calls


def relative_rmse(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference|| in float64; NaN if any element of `result` is."""
    exact = reference.double()
    return ((result.double() - exact).norm() / exact.norm()).item()


def measure_ceilings() -> Ceilings:
    """The ceilings of the current device, on random data. Takes about 0.1 s and 3 GB."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time(lambda _: target.copy_(source), copies=1, launches=4).median
    floats = source.view(torch.int32)
    read = graph_time(lambda _: torch.amax(floats), copies=1, launches=4).median
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    matmul = graph_time(lambda _: torch.mm(a, b, out=product), copies=1, launches=8).median
    nbytes = source.numel()
    return Ceilings(2 * nbytes / copy * 1e-6, nbytes / read * 1e-6, 2 * 8192**3 / matmul * 1e-6)


def environment() -> dict[str, Any]:
    """What a figure must be read with: GPU, driver, versions, commit, time."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _replay_time(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _output(command: list[str]) -> str:
    """The first line that a command prints, or "unknown" where it cannot run (a copy without git, say)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except OSError:
        return "unknown"
    lines = done.stdout.split("\n")
    return lines[0] if done.returncode == 0 and lines[0] else "unknown"
