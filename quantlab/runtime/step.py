"""One step's integers as tensors: which tokens, at which positions, where their keys and values go, what is sampled.

All of a step is one int64 vector, so that it reaches a device in one copy and a captured graph can read it where it
always lies. Knows nothing about models, attention or how tokens are chosen.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.runtime.batch import Slice


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of S slices, those of one token first; int64 but for the int32 of lengths.

    ids: [T], where an id < 0 stands for the token last sampled for sequence slot -1 - id. positions, cache_slots: [T],
    the latter block * block_size + place, -1 for padding. slots: [S] sequence slots. lengths: [S] tokens that a slice's
    sequence has in the cache once the step has written. starts: [S + 1] where slices begin among the tokens. rows: [R]
    tokens whose logits are wanted, in the order of the batch; `every_row`: they are all tokens in order. singles:
    slices of one token. longest, max_length, max_single_length: the most tokens of a slice, and the greatest length of
    all and of the slices of one token.
    """

    ids: Tensor
    positions: Tensor
    cache_slots: Tensor
    slots: Tensor
    lengths: Tensor
    starts: Tensor
    rows: Tensor
    every_row: bool
    singles: int
    longest: int
    max_length: int
    max_single_length: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[0]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the host knows of a step: T, S, and the numbers of Step that are no tensors."""

    tokens: int
    slices: int
    singles: int
    longest: int
    max_length: int
    max_single_length: int
    every_row: bool


def unpack(vector: Tensor, shape: StepShape) -> Step:
    """The step that lies in `vector`: views of it, but for the lengths."""
    tokens, slices = shape.tokens, shape.slices
    rows = vector.numel() - 3 * tokens - 3 * slices - 1
    parts = vector.split([tokens, tokens, tokens, slices, slices, slices + 1, rows])
    ids, positions, places, slots, lengths, starts, wanted = parts
    return Step(
        ids,
        positions,
        places,
        slots,
        lengths.to(torch.int32),
        starts,
        wanted,
        shape.every_row,
        shape.singles,
        shape.longest,
        shape.max_length,
        shape.max_single_length,
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """The fixed sizes of steps that a graph computes: slices of one token, longer ones, and the tokens of these.

    What a batch does not fill is padding. Logits are those of every single and of the last token of every chunk.
    """

    singles: int
    chunks: int = 0
    chunk_tokens: int = 0

    @property
    def tokens(self) -> int:
        """T."""
        return self.singles + self.chunk_tokens

    @property
    def slices(self) -> int:
        """S, and R."""
        return self.singles + self.chunks

    @property
    def vector_size(self) -> int:
        """Entries of the step's vector."""
        return 3 * self.tokens + 4 * self.slices + 1

    def shape(self, length: int) -> StepShape:
        """The shape of such steps for sequences of up to `length` tokens."""
        longest = max(self.chunk_tokens, 1)
        return StepShape(self.tokens, self.slices, self.singles, longest, length, length, every_row=not self.chunks)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which logits a step needs. rows: of its tokens; sampling: for each slice that samples, which of `rows`; prompts:
    slice -> (begin, end) among `rows`, one for each prompt token whose log probability was asked for."""

    rows: list[int]
    sampling: list[int]
    prompts: dict[int, tuple[int, int]]


def wanted_rows(slices: Items[Slice]) -> Wanted:
    """One row for a slice that samples, and those before each prompt token whose log probability was asked for."""
    wanted = Wanted([], [], {})
    begin = 0
    for place, part in enumerate(slices):
        rows, end = wanted.rows, begin + part.count
        if part.sequence.request.params.prompt_logprobs is not None and (targets := len(prompt_targets(part)[0])):
            wanted.prompts[place] = len(rows), len(rows) + targets
            rows += range(begin, begin + targets)
        if part.samples:
            if not rows or rows[-1] != end - 1:
                rows.append(end - 1)
            wanted.sampling.append(len(rows) - 1)
        begin = end
    return wanted


def prompt_targets(part: Slice) -> tuple[tuple[int, ...], int]:
    """The prompt tokens that a slice's positions predict, and how many likelier ones were asked for beside them."""
    request = part.sequence.request
    return request.prompt_ids[part.start + 1 : part.start + part.count + 1], request.params.prompt_logprobs or 0
