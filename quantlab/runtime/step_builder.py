"""Turns the scheduler's batches into steps, and keeps on the device which blocks each sequence slot has.

Knows nothing about models, attention or how tokens are chosen.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.step import Frame, Step, StepShape, unpack


class StepBuilder:
    """Makes steps for up to `max_num_seqs` sequences of `max_blocks` blocks at most.

    A sequence's `block_ids` may only grow while it holds a slot. `tables`: [max_num_seqs + 1, blocks] int32 on the
    device; the last row is for padding, and rows are whole vectors of 16 bytes, as are those cut off them.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.device = device
        self.tables = torch.zeros(max_num_seqs + 1, -(-max_blocks // 4) * 4, dtype=torch.int32, device=device)
        self._known = [0] * max_num_seqs

    def build(self, batch: Batch, rows: Items[int]) -> Step:
        """The step of `batch`; `rows` as in Step, counted in the batch's own order."""
        self._update_tables(batch)
        slices, rows = singles_first(batch.slices, rows)
        packed = _Packed(self.block_size)
        for part in slices:
            packed.add(part)
        ends = [part.start + part.count for part in slices]
        singles, tokens = sum(part.count == 1 for part in slices), len(packed.ids)
        shape = StepShape(
            tokens,
            len(slices),
            singles,
            max(part.count for part in slices),
            max(ends),
            max(ends[:singles], default=0),
            list(rows) == list(range(tokens)),
        )
        vector = self._host(packed.vector(rows)).to(self.device, non_blocking=True)
        return unpack(vector, shape)

    def fill(self, batch: Batch, frame: Frame, vector: Tensor) -> list[int]:
        """Write `batch`, which must fit `frame`, into the vector of a graph; returns each sampling slice's row."""
        self._update_tables(batch)
        slices, _ = singles_first(batch.slices, ())
        singles = sum(part.count == 1 for part in slices)
        packed = _Packed(self.block_size)
        for part in slices[:singles]:
            packed.add(part)
        packed.pad_singles(frame.singles, self.tables.shape[0] - 1)
        for part in slices[singles:]:
            packed.add(part)
        ends = [start - 1 for start in packed.starts[frame.singles + 1 :]]
        packed.pad_chunks(frame, self.tables.shape[0] - 1)
        rows = [*range(frame.singles), *ends, *[0] * (frame.slices - frame.singles - len(ends))]
        vector.copy_(self._host(packed.vector(rows)), non_blocking=True)
        places = {id(part): i if i < singles else i - singles + frame.singles for i, part in enumerate(slices)}
        return [places[id(part)] for part in batch.slices if part.samples]

    def idle(self, frame: Frame) -> Tensor:
        """The vector of a step in which all is padding."""
        packed = _Packed(self.block_size)
        packed.pad_singles(frame.singles, self.tables.shape[0] - 1)
        packed.pad_chunks(frame, self.tables.shape[0] - 1)
        rows = [*range(frame.singles), *[0] * frame.chunks]
        return torch.tensor(packed.vector(rows), dtype=torch.int64, device=self.device)

    def _host(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _update_tables(self, batch: Batch) -> None:
        """Tell the device which blocks sequences have got since it was last told."""
        for sequence in batch.admitted:
            assert sequence.slot is not None
            self._known[sequence.slot] = 0
        width = self.tables.shape[1]
        at: list[int] = []
        blocks: list[int] = []
        for part in batch.slices:
            slot, owned = slot_of(part), part.sequence.block_ids
            known = self._known[slot]
            if known < len(owned):
                at += range(slot * width + known, slot * width + len(owned))
                blocks += owned[known:]
                self._known[slot] = len(owned)
        if at:
            pair = self._host(at + blocks).to(self.device, non_blocking=True).view(2, -1)
            self.tables.view(-1).index_copy_(0, pair[0], pair[1].to(torch.int32))


class _Packed:
    """The lists that make up a step's vector, as slices are added."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self.ids: list[int] = []
        self.starts = [0]
        self._positions: list[int] = []
        self._places: list[int] = []
        self._slots: list[int] = []
        self._lengths: list[int] = []

    def add(self, part: Slice) -> None:
        """One more slice."""
        end = part.start + part.count
        self._add_ids(part, end)
        self._positions += range(part.start, end)
        self._add_places(part, end)
        self._slots.append(slot_of(part))
        self._lengths.append(end)
        self.starts.append(len(self.ids))

    def pad_singles(self, count: int, slot: int) -> None:
        """Up to `count` slices of one token that is written nowhere and attends to nothing."""
        more = count - len(self.ids)
        assert more >= 0 and self.starts[-1] == len(self._slots), "slices of one token come first"
        self._pad_tokens(more)
        self._pad_slices(more, slot)
        self.starts += range(len(self.starts), count + 1)

    def pad_chunks(self, frame: Frame, slot: int) -> None:
        """Up to the frame's chunks, with those that are missing empty, and its tokens, which belong to none."""
        end = len(self.ids)
        more = frame.slices - len(self._slots)
        assert more >= 0 and end <= frame.tokens, "the batch does not fit the frame"
        self._pad_slices(more, slot)
        self.starts += [end] * more
        self._pad_tokens(frame.tokens - end)

    def vector(self, rows: Items[int]) -> list[int]:
        """The whole vector, in the order of `unpack`."""
        tokens = self.ids + self._positions + self._places
        return tokens + self._slots + self._lengths + self.starts + list(rows)

    def _pad_tokens(self, count: int) -> None:
        self.ids += [0] * count
        self._positions += [0] * count
        self._places += [-1] * count

    def _pad_slices(self, count: int, slot: int) -> None:
        self._slots += [slot] * count
        self._lengths += [0] * count

    def _add_ids(self, part: Slice, end: int) -> None:
        sequence = part.sequence
        prompt, known = sequence.prompt_length, min(end, sequence.length)
        if part.start < prompt:
            self.ids += sequence.request.prompt_ids[part.start : min(known, prompt)]
        if known > prompt:
            self.ids += sequence.output_ids[max(part.start - prompt, 0) : known - prompt]
        if end > known:
            assert end == known + 1, "only the newest token may be unknown to the host"
            self.ids.append(-1 - slot_of(part))

    def _add_places(self, part: Slice, end: int) -> None:
        """Where each token's keys and values go."""
        size, blocks = self._block_size, part.sequence.block_ids
        if part.count == 1:
            self._places.append(blocks[part.start // size] * size + part.start % size)
            return
        for block in range(part.start // size, -(-end // size)):
            first, last = max(part.start, block * size), min(end, (block + 1) * size)
            base = (blocks[block] - block) * size
            self._places += range(base + first, base + last)


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


def slot_of(part: Slice) -> int:
    """The slot of a slice's sequence, which has one."""
    slot = part.sequence.slot
    assert slot is not None, "a slice of a sequence that holds no slot"
    return slot
