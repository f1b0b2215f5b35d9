"""Chooses the next token of each sequence on the device, and reads back what it chose when it is asked.

`launch` never waits for the device, so that a step can be launched before the one before was read. What a seeded
sequence draws depends on its seed and the token's position alone, never on the rest of the batch. Knows nothing about
models, blocks or text.
"""

import secrets
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from quantlab.runtime import distribution
from quantlab.runtime.batch import Sampled, Slice
from quantlab.runtime.distribution import keys, padded, stream
from quantlab.runtime.guided import Grammars, Guided
from quantlab.runtime.logprobs import LogprobTensors, read_logprobs, start_copy, token_logprobs
from quantlab.runtime.request import Sequence, TokenLogprobs
from quantlab.runtime.sampler_rows import (
    History,
    Plan,
    Row,
    change_scores,
    filter_scores,
    is_penalised,
    make_plan,
    upload,
)

NOT_FINITE = "the model's scores are not finite"
NOTHING_LEFT = "no token is left to choose: grammar, bias or min_tokens exclude all"
SENTENCES = {distribution.NOT_FINITE: NOT_FINITE, distribution.NOTHING_LEFT: NOTHING_LEFT}


class Operations(Protocol):
    """What is done to whole rows; modules have this form (`distribution`, and `quantlab_kernels.sampling` on a GPU)."""

    def greatest(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The greatest score of each row [S] and its place, int64 [S]; NaN where a row has one."""

    def settle(self, best: Tensor, tokens: Tensor, slots: Tensor, last: Tensor) -> Tensor:
        """The tokens [S] int64, or a code below 0 where the greatest score says that there is none to choose."""

    def nucleus_floor(self, probabilities: Tensor, top_p: Tensor) -> Tensor:
        """The least probability in each row's nucleus [S]."""

    def race(self, scores: Tensor, keys: Tensor) -> Tensor:
        """A token a row [S] int64 with the probabilities softmax(scores); keys: [S, 2] int32 fix it."""


def operations_for(device: torch.device) -> Operations:
    """Those of the kernels on a GPU (imported then: they need Triton), plain torch elsewhere."""
    name = "quantlab_kernels.sampling" if device.type == "cuda" else "quantlab.runtime.distribution"
    return cast(Operations, import_module(name))


@dataclass(frozen=True, slots=True)
class Draw:
    """One step's choice. `codes`: [S] int64 on its way to the host, a token or why there is none."""

    codes: Tensor
    places: tuple[int, ...]
    logprobs: LogprobTensors | None
    asking: tuple[tuple[int, int], ...]
    done: torch.cuda.Event | None

    def result(self) -> Sampled:
        """Wait until it is there; `failed` names slices by their place in the batch, their token id is 0."""
        if self.done is not None:
            self.done.synchronize()
        codes: list[int] = self.codes.tolist()
        failed = tuple((place, SENTENCES[code]) for place, code in zip(self.places, codes, strict=True) if code < 0)
        return Sampled(tuple(max(code, 0) for code in codes), self._logprobs(len(codes)), failed=failed)

    def _logprobs(self, rows: int) -> tuple[TokenLogprobs | None, ...] | None:
        if self.logprobs is None:
            return None
        values: list[TokenLogprobs | None] = [None] * rows
        read = read_logprobs(self.logprobs, [top for _, top in self.asking])
        for (row, _), value in zip(self.asking, read, strict=True):
            values[row] = value
        return tuple(values)


class Sampler:
    """Samples for up to `max_num_seqs` sequences at a time, each in the slot that the scheduler gave it.

    `last_tokens`: [max_num_seqs] int64 on the device, the token that each slot sampled last: what a step is computed
    from when the host does not know it yet. Memory: 5 bytes a slot and token of the vocabulary, from the start.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        eos_token_ids: Ordered[int] = (),
        grammars: Grammars | None = None,
    ):
        self.vocab_size = vocab_size
        self.device = device
        self.eos_token_ids = tuple(eos_token_ids)
        self._guided = Guided(vocab_size, grammars)
        self.width = padded(vocab_size)
        self.operations = operations_for(device)
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        shape = (max_num_seqs, self.width)
        self.history = History(
            torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, dtype=torch.bool, device=device)
        )
        self._serials: dict[int, int] = {}  # of the sequence in each slot: a slot's next sequence is another
        self._streams: dict[int, int] = {}  # where the random numbers of each slot's sequence begin
        self._early: set[int] = set()  # slots whose sequence has a least number of tokens
        self._admitted = 0
        self._plan: tuple[object, Plan] | None = None

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile, on a GPU, what is otherwise compiled at the first use; logits will be of `dtype`."""
        if self.device.type == "cuda":
            kernels = import_module("quantlab_kernels.sampling")
            kernels.warm_sampling(self.vocab_size, len(self.last_tokens), dtype, self.device)

    def admit(self, sequence: Sequence) -> None:
        """Take `sequence` into its slot, with the output it has already when it was preempted before."""
        slot, params = sequence.slot, sequence.request.params
        assert slot is not None and slot not in self._serials
        self._admitted += 1
        self._serials[slot] = self._admitted
        self._streams[slot] = stream(secrets.randbits(64) if params.seed is None else params.seed)
        if params.grammar is not None:
            self._guided.admit(slot, params.grammar)
        if params.min_tokens and params.grammar is None:  # a grammar has its own say about where a text may end
            self._early.add(slot)
        if is_penalised(params):
            self._remember(slot, sequence)

    def release(self, slot: int) -> None:
        """Forget the sequence in `slot`, if there is one: it may have been sent back before it began."""
        self._serials.pop(slot, None)
        self._streams.pop(slot, None)
        self._early.discard(slot)
        self._guided.release(slot)

    def launch(self, logits: Tensor, slices: Ordered[Slice]) -> Draw:
        """Begin to sample for those of `slices` that sample.

        logits: [S, V] of any float dtype, a row for each of them in order; they are not changed. A sequence with a
        grammar must have no token that the host does not know.
        """
        sampling = [(place, part) for place, part in enumerate(slices) if part.samples]
        places, parts = tuple(place for place, _ in sampling), [part for _, part in sampling]
        assert logits.shape == (len(parts), self.vocab_size)
        plan = self._plan_for(parts)
        best, tokens = self._choose(logits, plan, parts)
        codes = self.operations.settle(best, tokens, plan.slots, self.last_tokens)
        if plan.penalties is not None:
            drawn = plan.penalties.slots * self.width + self.last_tokens.index_select(0, plan.penalties.slots)
            self.history.counts.view(-1).index_add_(0, drawn, torch.ones_like(drawn, dtype=torch.int32))
        asking = tuple((row, top) for row, part in enumerate(parts) if (top := _logprobs_of(part)) is not None)
        logprobs = self._logprobs(logits, codes.clamp(min=0), asking).to_host() if asking else None
        return Draw(start_copy(codes), places, logprobs, asking, self._mark())

    def _choose(self, logits: Tensor, plan: Plan, parts: Ordered[Slice]) -> tuple[Tensor, Tensor]:
        """The greatest score of each row [S] and the row's token [S] int64, which is one only if that is finite."""
        guided = self._guided.rows(parts)
        if not plan.random and not plan.changes_scores and not guided:
            return self.operations.greatest(logits)
        scores = logits.new_empty(len(parts), self.width, dtype=torch.float32)
        scores[:, : self.vocab_size] = logits
        scores[:, self.vocab_size :] = -torch.inf
        change_scores(scores, plan, self.history)
        if guided:
            self._guided.mask(scores, guided, parts)
        best, likeliest = self.operations.greatest(scores)
        if plan.random:
            drawn = self._draw(scores.sub_(best[:, None]), plan, parts)
            likeliest = drawn if plan.greedy is None else torch.where(plan.greedy, likeliest, drawn)
        return best, likeliest

    def _draw(self, scores: Tensor, plan: Plan, parts: Ordered[Slice]) -> Tensor:
        if plan.inverse_temperature is not None:
            scores.mul_(plan.inverse_temperature)
        if plan.filters is not None:
            filter_scores(scores, plan.filters, self.operations.nucleus_floor)
        noise = [(0, 0)] * len(parts)
        for row in plan.random:
            part = parts[row]
            noise[row] = keys(self._streams[_slot(part)], part.start + part.count)
        return self.operations.race(scores, upload(noise, torch.int32, self.device))

    def _plan_for(self, parts: Ordered[Slice]) -> Plan:
        slots = [_slot(part) for part in parts]
        blocked = {row: self._blocked(parts[row]) for row, slot in enumerate(slots) if slot in self._early}
        key = ([self._serials[slot] for slot in slots], blocked)
        if self._plan is None or self._plan[0] != key:
            rows = [Row(part.sequence.request.params, slot) for part, slot in zip(parts, slots, strict=True)]
            self._plan = key, make_plan(rows, blocked, self.width, self.device)
        return self._plan[1]

    def _blocked(self, part: Slice) -> tuple[int, ...]:
        """The tokens that would end a sequence too soon."""
        params = part.sequence.request.params
        if part.start + part.count - part.sequence.prompt_length >= params.min_tokens:
            return ()
        ending = (*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids))
        return tuple(token for token in ending if 0 <= token < self.vocab_size)

    def _remember(self, slot: int, sequence: Sequence) -> None:
        """The history of a penalised sequence from its text."""
        self.history.prompt[slot].zero_().index_fill_(
            0, upload(sequence.request.prompt_ids, torch.int64, self.device), True
        )
        written = upload(sequence.output_ids, torch.int64, self.device)
        ones = torch.ones_like(written, dtype=torch.int32)
        self.history.counts[slot].zero_().index_add_(0, written, ones)

    def _logprobs(self, logits: Tensor, tokens: Tensor, asking: tuple[tuple[int, int], ...]) -> LogprobTensors:
        if len(asking) < len(tokens):
            rows = upload([row for row, _ in asking], torch.int64, self.device)
            logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
        return token_logprobs(logits, tokens, max(top for _, top in asking))

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        done = torch.cuda.Event()
        done.record()
        return done


def _slot(part: Slice) -> int:
    slot = part.sequence.slot
    assert slot is not None, "a sequence that samples has a slot"
    return slot


def _logprobs_of(part: Slice) -> int | None:
    return part.sequence.request.params.logprobs
