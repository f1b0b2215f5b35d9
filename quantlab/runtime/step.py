"""One step's integers as tensors: which tokens, at which positions, where their keys and values go, what is sampled.

All of a step is one int64 vector, so that it reaches a device in one copy and a captured graph can read it where it
always lies. Knows nothing about models, attention or how tokens are chosen.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.runtime.batch import Batch, Slice


@dataclass(frozen=True, slots=True)
class Step:
    """T tokens of S slices, those of one token first; int64 but for the int32 of lengths and starts.

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
class Padding:
    """What fills a step up to `tokens` tokens and as many slices of one token; `slot` belongs to no sequence."""

    tokens: int
    slot: int


class StepBuilder:
    """Turns batches into steps, and keeps on the device which blocks each sequence slot has.

    A sequence's `block_ids` may only grow while it holds a slot. Row `max_num_seqs` of `tables` is for padding.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.device = device
        self.tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self._known = [0] * max_num_seqs

    def build(self, batch: Batch, rows: Items[int], padding: Padding | None = None, into: Tensor | None = None) -> Step:
        """The step of `batch`; `rows` as in Step, counted in the batch's own order. With `into`, the vector that a
        graph reads takes it."""
        for sequence in batch.admitted:
            assert sequence.slot is not None
            self._known[sequence.slot] = 0
        self._update_tables(batch.slices)
        slices, rows = singles_first(batch.slices, rows)
        packed, tokens = self._pack(slices, rows, padding)
        host = torch.tensor(packed, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        vector = host.to(self.device, non_blocking=True) if into is None else into.copy_(host, non_blocking=True)
        ends = [part.start + part.count for part in slices]
        singles = sum(part.count == 1 for part in slices)
        shape = StepShape(
            tokens,
            len(slices) if padding is None else padding.tokens,
            singles if padding is None else padding.tokens,
            max(part.count for part in slices),
            max(ends),
            max(ends[:singles], default=0),
            padding is not None or list(rows) == list(range(tokens)),
        )
        return unpack(vector, shape)

    def _pack(self, slices: Items[Slice], rows: Items[int], padding: Padding | None) -> tuple[list[int], int]:
        """The vector, and T."""
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        starts = [0]
        for part in slices:
            self._pack_tokens(part, ids)
            positions += range(part.start, part.start + part.count)
            places += self._places(part)
            starts.append(len(ids))
        slots = [_slot(part) for part in slices]
        lengths = [part.start + part.count for part in slices]
        more = 0 if padding is None else padding.tokens - len(ids)
        assert more >= 0 and (padding is None or starts == list(range(len(starts))))
        if padding is not None:
            ids += [0] * more
            positions += [0] * more
            places += [-1] * more
            slots += [padding.slot] * more
            lengths += [0] * more
            starts += range(len(starts), padding.tokens + 1)
            rows = [*rows, *range(len(rows), padding.tokens)]
        return ids + positions + places + slots + lengths + starts + list(rows), len(ids)

    def _pack_tokens(self, part: Slice, ids: list[int]) -> None:
        sequence, end = part.sequence, part.start + part.count
        prompt, known = sequence.prompt_length, min(end, sequence.length)
        if part.start < prompt:
            ids += sequence.request.prompt_ids[part.start : min(known, prompt)]
        if known > prompt:
            ids += sequence.output_ids[max(part.start - prompt, 0) : known - prompt]
        if end > known:
            assert end == known + 1, "only the newest token may be unknown to the host"
            ids.append(-1 - _slot(part))

    def _places(self, part: Slice) -> list[int]:
        """Where each token's keys and values go."""
        size, blocks = self.block_size, part.sequence.block_ids
        if part.count == 1:
            return [blocks[part.start // size] * size + part.start % size]
        return [blocks[at // size] * size + at % size for at in range(part.start, part.start + part.count)]

    def _update_tables(self, slices: Items[Slice]) -> None:
        """Tell the device which blocks sequences have got since it was last told."""
        width = self.tables.shape[1]
        at: list[int] = []
        blocks: list[int] = []
        for part in slices:
            slot, owned = _slot(part), part.sequence.block_ids
            known = self._known[slot]
            if known < len(owned):
                at += range(slot * width + known, slot * width + len(owned))
                blocks += owned[known:]
                self._known[slot] = len(owned)
        if at:
            host = torch.tensor([at, blocks], dtype=torch.int64, pin_memory=self.device.type == "cuda")
            pair = host.to(self.device, non_blocking=True)
            self.tables.view(-1).index_copy_(0, pair[0], pair[1].to(torch.int32))


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
    """The step that lies in `vector`: views of it, but for the two that become int32."""
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
        starts.to(torch.int32),
        wanted,
        shape.every_row,
        shape.singles,
        shape.longest,
        shape.max_length,
        shape.max_single_length,
    )


def singles_first(slices: Items[Slice], rows: Items[int]) -> tuple[Items[Slice], Items[int]]:
    """The slices with those of one token in front, and where `rows` of the given order lie then."""
    ordered = sorted(slices, key=lambda part: part.count > 1)
    if all(a is b for a, b in zip(slices, ordered, strict=True)):
        return slices, rows
    begin, places = 0, {}
    for part in ordered:
        places[id(part)] = begin
        begin += part.count
    moved = [places[id(part)] + i for part in slices for i in range(part.count)]
    return ordered, [moved[row] for row in rows]


def vector_size(tokens: int) -> int:
    """Entries of the vector of a step of `tokens` slices of one token, all of whose logits are wanted."""
    return 3 * tokens + 3 * tokens + 1 + tokens


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


def _slot(part: Slice) -> int:
    slot = part.sequence.slot
    assert slot is not None, "a slice of a sequence that holds no slot"
    return slot
