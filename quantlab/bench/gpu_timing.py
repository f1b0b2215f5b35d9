"""Times GPU work: replays of a captured CUDA graph over rotating operands, and the ceilings to hold them against.

Every kernel bench times through `graph_times`, prints `relative_rmse` beside each time, and takes its percentages from
`measure_ceilings` of the same run. A GPU's speed depends on what it did before: it idles at a sixth of its clock, and
after long products its power limit holds the clock down for a while. So what is compared is replayed in turn (A B A B),
after all of it has run until it got no faster, and each time says at which clock and power it was taken. Knows nothing
about any one kernel.
"""

import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from quantlab.bench.gpu_state import State, read_state

# A replay must find its operands in memory, not in a cache: the copies together outweigh an L2 of 60 MB 4 times.
COLD_BYTES = 256_000_000
# Clocks are up when so many stretches of this many seconds in a row bring no faster replay, or after so many.
WARM_SECONDS, SAME_STRETCHES, MOST_STRETCHES = 0.02, 3, 15
NO_FASTER = 0.985
# Of products before the ceilings, which are measured first: the clock rises, and the power limit settles.
BRING_UP_SECONDS = 0.5
# How much work to enqueue before the clock is read beside it, in microseconds.
READING = 5_000.0


@dataclass(frozen=True, slots=True)
class Work:
    """What to time: `enqueue(i)` enqueues it on copy `i` of its operands; a graph makes at least `launches` calls."""

    enqueue: Callable[[int], object]
    copies: int = 1
    launches: int = 48


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a launch: the median of the replays, the fastest and the slowest; the GPU's state beside them."""

    median: float
    low: float
    high: float
    state: State | None = None


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
    """Time one `Work`."""
    return graph_times([Work(enqueue, copies, launches)], replays)[0]


def graph_times(works: Sequence[Work], replays: int = 7) -> list[Timing]:
    """Time each of `works`, in turn with the others, on the current stream's GPU.

    A graph makes a whole number of rounds over the copies; what it allocates stays in it.
    """
    graphs = [_capture(work) for work in works]
    settle(lambda: sum(_replay_time(graph) for graph, _ in graphs))
    times = [[_replay_time(graph) / calls for graph, calls in graphs] for _ in range(replays)]
    for _ in range(math.ceil(READING / sum(us * calls for us, (_, calls) in zip(times[-1], graphs, strict=True)))):
        for graph, _ in graphs:
            graph.replay()
    state = read_state()  # while the replays run
    torch.cuda.synchronize()
    found = [sorted(column) for column in zip(*times, strict=True)]
    return [Timing(one[replays // 2], one[0], one[-1], state) for one in found]


def _capture(work: Work) -> tuple[torch.cuda.CUDAGraph, int]:
    """The graph, and how many calls it makes."""
    order = [i for _ in range(-(-work.launches // work.copies)) for i in range(work.copies)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in order[:2]:
            work.enqueue(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in order:
            work.enqueue(i)
    return graph, len(order)


def settle(replay: Callable[[], float]) -> int:
    """Call `replay`, which returns how long it took, until it gets no faster; returns the number of calls.

    After idling, the first milliseconds of work run up to 1.5 times slower, and how many there are depends on how long
    the GPU was idle: loading a kernel for a second costs more of them than drawing an operand.
    """
    calls, best, same = 0, math.inf, 0
    for _ in range(MOST_STRETCHES):
        fastest, end = math.inf, time.perf_counter() + WARM_SECONDS
        while fastest == math.inf or time.perf_counter() < end:
            fastest = min(fastest, replay())
            calls += 1
        same = same + 1 if fastest > NO_FASTER * best else 0
        best = min(best, fastest)
        if same == SAME_STRETCHES:
            break
    return calls


def relative_rmse(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference|| in float64; NaN if any element of `result` is."""
    exact = reference.double()
    return ((result.double() - exact).norm() / exact.norm()).item()


def measure_ceilings() -> Ceilings:
    """The ceilings of the current device, on random data. Takes about 1 s and 3 GB, and brings the clock up."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    end = time.perf_counter() + BRING_UP_SECONDS
    while time.perf_counter() < end:
        torch.mm(a, b, out=product)
        torch.cuda.synchronize()
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time(lambda _: target.copy_(source), copies=1, launches=4).median
    floats = source.view(torch.int32)
    read = graph_time(lambda _: torch.amax(floats), copies=1, launches=4).median
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
