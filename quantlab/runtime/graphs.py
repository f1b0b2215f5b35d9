"""Steps captured as CUDA graphs, each for all batches that fit its frame.

A step of single tokens is padded to the next of a ladder of batch sizes, and there is a graph for each way in which its
attention is cut along the tokens. A step with pieces of prompts has a coarser frame: so many singles, CHUNKS pieces,
so many tokens of them. A replay is one launch instead of hundreds, which take Python longer than a GPU. All graphs
share one pool of memory, so the logits of one are gone when another is replayed. Knows nothing about sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlab.runtime.batch import Batch
from quantlab.runtime.step import Frame, Step, unpack
from quantlab.runtime.step_builder import StepBuilder

LADDER = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640,
          768, 896, 1024)  # fmt: skip
SHORTEST = 512  # tokens: shorter sequences are served as if they were as long
CHUNKS = 16  # pieces of prompts in a step
MIXED_SINGLES = (0, 16, 64, 128, 256, 512)
CHUNK_TOKENS = (16, 64, 128, 256, 512, 1024, 1536, 2048)


@dataclass(frozen=True, slots=True)
class Reach:
    """What graphs are captured for: sequences, tokens a step, tokens a sequence, and of these with pieces of prompts.

    `cut(size, length)` names how attention of `size` sequences of up to `length` tokens is cut: lengths with one name
    share a graph.
    """

    sequences: int
    step_tokens: int
    length: int
    mixed_length: int
    cut: Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph that computes `logits` [R, V] from `vector` for sequences of up to `length` tokens."""

    graph: torch.cuda.CUDAGraph
    frame: Frame
    vector: Tensor
    logits: Tensor
    length: int


class StepGraphs:
    """Graphs of `forward`, which computes logits from a step on the device without waiting for it."""

    def __init__(self, forward: Callable[[Step], Tensor], builder: StepBuilder, reach: Reach):
        self._forward, self._builder, self._reach = forward, builder, reach
        self._captured: dict[Frame, list[_Captured]] = {}

    @torch.inference_mode()
    def capture(self) -> int:
        """Run and capture every graph, the largest first; returns how many there are."""
        reach, device = self._reach, self._builder.device
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        wanted = [(frame, [reach.mixed_length]) for frame in mixed_frames(reach.sequences, reach.step_tokens)]
        for size in reversed(ladder(reach.sequences)):
            wanted.append((Frame(size), cut_lengths(partial(reach.cut, size), reach.length)))
        for frame, lengths in wanted:
            vector = self._builder.idle(frame)
            self._captured[frame] = [self._capture(frame, length, vector, pool, stream) for length in lengths]
        torch.cuda.synchronize(device)
        return sum(map(len, self._captured.values()))

    def run(self, batch: Batch, rows: Sequence[int]) -> Tensor | None:
        """Logits [S, V] of a batch of which only those that are sampled are wanted; None if no graph has room for it.

        They are there until the next call.
        """
        sampling = sum(part.samples for part in batch.slices)
        found = self._find(batch) if sampling == len(rows) else None
        if found is None:
            return None
        wanted = self._builder.fill(batch, found.frame, found.vector)
        found.graph.replay()
        if wanted == list(range(len(wanted))):
            return found.logits[: len(wanted)]
        index = torch.tensor(wanted, dtype=torch.int64, pin_memory=True).to(found.logits.device, non_blocking=True)
        return found.logits.index_select(0, index)

    def _find(self, batch: Batch) -> _Captured | None:
        """The smallest graph that `batch` fits."""
        singles = sum(part.count == 1 for part in batch.slices)
        tokens, chunks = batch.tokens - singles, len(batch.slices) - singles
        longest = max(part.start + part.count for part in batch.slices)
        fitting = [
            graph
            for frame, graphs in self._captured.items()
            if frame.singles >= singles and frame.chunk_tokens >= tokens and frame.chunks >= chunks
            for graph in graphs
            if graph.length >= longest and (chunks > 0 or frame.chunks == 0)
        ]
        return min(fitting, key=lambda graph: (graph.frame.tokens, graph.length), default=None)

    def _capture(self, frame: Frame, length: int, vector: Tensor, pool: Any, stream: torch.cuda.Stream) -> _Captured:
        shape = frame.shape(length)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(unpack(vector, shape))  # compiles, and makes what kernels keep for a stream
        stream.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            logits = self._forward(unpack(vector, shape))
        return _Captured(graph, frame, vector, logits, length)


def ladder(most: int) -> list[int]:
    """The batch sizes that are captured for up to `most` sequences."""
    return [*(size for size in LADDER if size < most), min(most, LADDER[-1])]


def mixed_frames(sequences: int, step_tokens: int) -> list[Frame]:
    """The frames of steps with pieces of prompts, the largest first."""
    singles = [count for count in MIXED_SINGLES if count < sequences]
    if sequences <= MIXED_SINGLES[-1]:
        singles.append(sequences)
    tokens = [count for count in CHUNK_TOKENS if count < step_tokens]
    if step_tokens <= CHUNK_TOKENS[-1]:
        tokens.append(step_tokens)
    return [Frame(some, CHUNKS, count) for count in reversed(tokens) for some in reversed(singles)]


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
