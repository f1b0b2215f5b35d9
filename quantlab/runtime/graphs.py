"""Decode steps captured as CUDA graphs: for a ladder of batch sizes, and of lengths where attention is cut otherwise.

A step of single tokens is padded to the next size and replayed: one launch instead of hundreds. All graphs share one
pool of memory, so the logits of one are gone when another is replayed. Knows nothing about sampling.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlab.runtime.batch import Batch
from quantlab.runtime.step import Padding, Step, StepBuilder, StepShape, unpack, vector_size

LADDER = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640,
          768, 896, 1024)  # fmt: skip
SHORTEST = 512  # tokens: shorter sequences are served as if they were as long


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph that computes `logits` [size, V] from `vector` for sequences of up to `length` tokens."""

    graph: torch.cuda.CUDAGraph
    vector: Tensor
    logits: Tensor
    size: int
    length: int


class DecodeGraphs:
    """Graphs of `forward`, which computes logits from a step on the device without waiting for it.

    `cut(size, length)` names how attention of `size` sequences of up to `length` tokens is cut: lengths with one name
    share a graph.
    """

    def __init__(
        self,
        forward: Callable[[Step], Tensor],
        builder: StepBuilder,
        cut: Callable[[int, int], object],
        most: int,
        longest: int,
    ):
        self._forward, self._builder = forward, builder
        self._most, self._longest = most, longest
        self._cut = cut
        self._captured: dict[int, list[_Captured]] = {}

    @torch.inference_mode()
    def capture(self) -> int:
        """Run and capture every graph, the largest first; returns how many there are."""
        device = self._builder.device
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        for size in reversed(ladder(self._most)):
            vector = torch.tensor(_idle_vector(size, self._builder.tables.shape[0] - 1), device=device)
            lengths = cut_lengths(partial(self._cut, size), self._longest)
            self._captured[size] = [self._capture(size, length, vector, pool, stream) for length in lengths]
        torch.cuda.synchronize(device)
        return sum(map(len, self._captured.values()))

    def run(self, batch: Batch, rows: Sequence[int]) -> Tensor | None:
        """Logits [S, V] of a batch of single tokens all of whose logits are wanted; None for any other batch.

        They are there until the next call.
        """
        count = len(batch.slices)
        size = next((size for size in sorted(self._captured) if size >= count), None)
        if size is None or batch.tokens > count or len(rows) < count:
            return None
        longest = max(part.start + 1 for part in batch.slices)
        found = next(graph for graph in self._captured[size] if graph.length >= longest)
        padding = Padding(size, self._builder.tables.shape[0] - 1)
        self._builder.build(batch, rows, padding, into=found.vector)
        found.graph.replay()
        return found.logits[:count]

    def _capture(self, size: int, length: int, vector: Tensor, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        shape = StepShape(size, size, size, 1, length, length, every_row=True)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(unpack(vector, shape))  # compiles, and makes what kernels keep for a stream
        stream.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = self._forward(unpack(vector, shape))
        return _Captured(graph, vector, logits, size, length)


def ladder(most: int) -> list[int]:
    """The batch sizes that are captured for up to `most` sequences."""
    return [*(size for size in LADDER if size < most), min(most, LADDER[-1])]


def cut_lengths(cut: Callable[[int], object], longest: int) -> list[int]:
    """The greatest lengths, up to `longest`, of each way in which attention is cut, looked at in powers of two."""
    tried: list[int] = []
    length = SHORTEST
    while length < longest:
        tried.append(length)
        length *= 2
    tried.append(longest)
    names = [cut(length) for length in tried]
    return [length for i, length in enumerate(tried) if i + 1 == len(tried) or names[i + 1] != names[i]]


def _idle_vector(size: int, slot: int) -> list[int]:
    """The step vector of `size` padded tokens."""
    starts: Iterable[int] = range(size + 1)
    vector = [*[0] * (2 * size), *[-1] * size, *[slot] * size, *[0] * size, *starts, *range(size)]
    assert len(vector) == vector_size(size)
    return vector
