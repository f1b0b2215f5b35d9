"""Decides what each step computes: a budget of tokens, handed to sequences one token or a piece of prompt at a time.

Integers only. Knows nothing about models, devices or text, nor about when a step runs.
"""

import time
from collections.abc import Iterable

from quantlab.log import logger
from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.block_pool import BlockPool
from quantlab.runtime.options import EngineInfo, EngineStats, Policy
from quantlab.runtime.prefixes import Prefixes
from quantlab.runtime.request import Request, Sequence
from quantlab.runtime.waiting import WaitingQueue

LOG = logger(__name__)


class Scheduler:
    """Which sequence computes how many tokens in which blocks.

    There is no prefill phase: whoever lacks computed tokens gets some. First come those that lack one token, since a
    reader waits for each of them, then unfinished prompts, then new ones, as far as the budget, the slots and the
    blocks go. A sequence is admitted when all its known tokens have blocks and each running one that may
    need another has one to spare. When blocks run out later, whoever has computed least gives up its own and waits
    again (recompute).
    """

    def __init__(self, info: EngineInfo, policy: Policy = "fcfs", prefix_caching: bool = True) -> None:
        assert info.num_blocks * info.block_size >= info.max_model_len, "the longest sequence must fit"
        self.pool = BlockPool(info.num_blocks)
        self.waiting = WaitingQueue(policy)
        self.running: dict[int, Sequence] = {}  # by slot, in order of admission
        self._info = info
        self._policy = policy
        self._prefixes = Prefixes(self.pool, info.block_size, prefix_caching)
        # More sequences than tokens in a step would leave the last ones without any for as long as the others run.
        self._slots = list(reversed(range(min(info.max_num_seqs, info.max_batch_tokens))))
        self._slices: dict[int, Slice] = {}  # of the step being made, by slot
        self._budget = 0
        self._released: list[int] = []
        self._admitted: list[Sequence] = []
        self._sent_back: set[int] = set()  # preempted in the step being made, by order
        self._steps = 0
        self._orders = 0
        self._refused = (-1, 0, 0)  # who did not fit when so many blocks and slots were free
        self._counts = {"prompt_tokens": 0, "prefix_queries": 0, "prefix_hits": 0, "preemptions": 0}
        self._recomputed = 0

    def add(self, request: Request) -> Sequence:
        """Let `request` wait for its turn."""
        room = self._info.max_model_len - len(request.prompt_ids)
        asked = request.params.max_tokens
        limit = room if asked is None else min(asked, room)
        self._orders += 1
        sequence = Sequence(request, arrived=time.monotonic(), order=self._orders, limit=limit)
        self.waiting.push(sequence)
        return sequence

    def append(self, sequence: Sequence, token: int) -> None:
        """A token that was sampled for `sequence`, which runs or has been preempted since."""
        if sequence.slot is None:
            self.waiting.learn(sequence, token)
        else:
            sequence.output_ids.append(token)

    def remove(self, sequence: Sequence) -> None:
        """Forget `sequence`, which waits or runs: it has ended, and its blocks and slot are free."""
        if not self.waiting.remove(sequence):
            self._release(sequence)

    def fail(self, sequence: Sequence) -> None:
        """Forget `sequence`, whose numbers were wrong, and what was computed for it."""
        self._prefixes.forget(sequence)
        self.remove(sequence)

    def schedule(self) -> Batch | None:
        """The next step, or None when nobody can compute anything now.

        The step counts as computed from here on; a sequence whose token it samples has one more `pending`.
        """
        self._budget = self._info.max_batch_tokens
        self._slices = {}
        self._admitted = []
        self._sent_back = set()
        self._continue()
        if not self._sent_back:
            self._admit()
        return self._batch()

    def computed(self, part: Slice) -> None:
        """The step of `part` has ended well: others may use what it computed."""
        self._prefixes.computed(part)

    def undo(self, batch: Batch) -> None:
        """The step scheduled last will not be read back: it is as if its sequences had been preempted before it."""
        self._released = [*batch.released, *self._released]
        for part in batch.slices:
            part.sequence.pending -= part.samples
            if part.sequence.slot is not None:
                self._preempt(part.sequence)

    def stats(self) -> EngineStats:
        """Gauges of now and counters since the start; tokens generated are the engine's to count."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            waiting_tokens=self.waiting.tokens,
            blocks_free=self.pool.free,
            blocks_total=self.pool.num_blocks,
            steps=self._steps,
            recomputed_tokens=self._recomputed,
            **self._counts,
        )

    def check_integrity(self) -> None:
        """Asserts that blocks, slots and queue add up."""
        self.pool.check_integrity([sequence.block_ids for sequence in self.running.values()])
        capacity = min(self._info.max_num_seqs, self._info.max_batch_tokens)
        assert sorted([*self._slots, *self.running]) == list(range(capacity))
        for slot, sequence in self.running.items():
            assert sequence.slot == slot and sequence not in self.waiting
            assert sequence.computed <= len(sequence.block_ids) * self._info.block_size
            assert sequence.computed <= sequence.length + sequence.pending <= self._info.max_model_len
        self._prefixes.check_integrity(list(self.running.values()))
        assert self.waiting.tokens == sum(sequence.length for sequence in self.waiting)
        for sequence in self.waiting:
            assert sequence.slot is None and not sequence.block_ids and not sequence.computed

    def _continue(self) -> None:
        """Give tokens to the sequences that run: to those that lack one first."""
        prompts = []
        for sequence in list(self.running.values()):
            missing = sequence.length + sequence.pending - sequence.computed
            if missing > 1:
                prompts.append(sequence)
            elif missing and self._may_grow(sequence) and self._budget and self._room_for_one(sequence):
                self._compute(sequence, 1)
        for sequence in prompts:
            if sequence.slot is not None and self._budget:  # it may have been preempted in this very step
                self._compute(sequence, min(self._budget, sequence.length + sequence.pending - sequence.computed))

    def _may_grow(self, sequence: Sequence) -> bool:
        """Whether a sequence that lacks one token may compute it now."""
        if not sequence.pending:
            return True
        # A grammar must have seen the last token before the next one is drawn; the last of all is never computed.
        return len(sequence.output_ids) + sequence.pending < sequence.limit and sequence.request.params.grammar is None

    def _room_for_one(self, sequence: Sequence) -> bool:
        """Whether the next token has its block, taken from another sequence if need be."""
        if sequence.computed < len(sequence.block_ids) * self._info.block_size:
            return True
        while not self.pool.free:
            victim = min(self.running.values(), key=self._work_to_redo)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_ids += self.pool.take(1)
        return True

    def _compute(self, sequence: Sequence, count: int) -> None:
        assert sequence.slot is not None
        whole = sequence.computed + count == sequence.length + sequence.pending
        samples = whole and len(sequence.output_ids) + sequence.pending < sequence.limit
        self._slices[sequence.slot] = Slice(sequence, sequence.computed, count, samples)
        self._budget -= count

    def _admit(self) -> None:
        """Give slots, blocks and tokens to those that wait, strictly in turn: nobody passes a long prompt by."""
        while self._budget and (sequence := self.waiting.peek()) is not None:
            # Who has just lost its blocks waits a step: what was computed in them is not read back yet.
            if sequence.order in self._sent_back or not self._fits(sequence):
                break
            assert not sequence.pending, "a token that only the device knows belongs to a slot that is gone"
            self.waiting.pop()
            self._take_slot(sequence)
            self._compute(sequence, min(self._budget, sequence.length - sequence.computed))

    def _fits(self, sequence: Sequence) -> bool:
        """Whether `sequence` should run now; with priorities, after those that matter less have made room."""
        asked = (sequence.order, self.pool.free, len(self._slots))
        if asked == self._refused or self._prefixes.is_being_computed(sequence):
            return False
        while not self._slots or self._wanted(sequence) > self.pool.free:
            victim = self._lesser(sequence)
            if victim is None:
                self._refused = asked
                return False
            self._preempt(victim)
        return True

    def _wanted(self, sequence: Sequence) -> int:
        """Free blocks that there must be to admit `sequence`: its own, and one for each that runs and may need it."""
        hits = self._prefixes.find(sequence)
        own = -(-sequence.length // self._info.block_size) - len(hits) + self.pool.idle(hits)
        return own + self._growing(self.running.values())

    def _growing(self, sequences: Iterable[Sequence]) -> int:
        """How many of `sequences` may come to need a block more than they have."""
        size = self._info.block_size
        return sum(len(one.block_ids) * size < one.prompt_length + one.limit for one in sequences)

    def _lesser(self, sequence: Sequence) -> Sequence | None:
        """A running sequence that matters less than one that waits, if sending all such back can make room for it."""
        lower = [other for other in self.running.values() if other.request.priority > sequence.request.priority]
        if self._policy == "fcfs" or not lower:
            return None
        hits = set(self._prefixes.find(sequence))
        gain = sum(self.pool.alone(set(other.block_ids) - hits) for other in lower)
        enough = self.pool.free + gain >= self._wanted(sequence) - self._growing(lower)
        return min(lower, key=self._work_to_redo) if enough else None

    def _take_slot(self, sequence: Sequence) -> None:
        hits = self._prefixes.find(sequence)
        self.pool.share(hits)
        sequence.block_ids = hits + self.pool.take(-(-sequence.length // self._info.block_size) - len(hits))
        sequence.computed = len(hits) * self._info.block_size
        sequence.slot = self._slots.pop()
        self.running[sequence.slot] = sequence
        self._admitted.append(sequence)
        self._prefixes.begin(sequence)
        if sequence.preemptions:
            self._recomputed += max(0, sequence.redo - sequence.computed)
        else:
            sequence.queued = time.monotonic() - sequence.arrived
            sequence.cached = sequence.computed
            self._counts["prompt_tokens"] += sequence.prompt_length
            self._counts["prefix_queries"] += sequence.prompt_length if self._prefixes.may_share(sequence) else 0
            self._counts["prefix_hits"] += sequence.computed

    def _work_to_redo(self, sequence: Sequence) -> tuple[int, int, int]:
        """The order of victims: who matters least, has computed least, came last."""
        rank = 0 if self._policy == "fcfs" else sequence.request.priority
        return -rank, sequence.computed, -sequence.order

    def _preempt(self, victim: Sequence) -> None:
        """Take the blocks and the slot of `victim`, which waits again and then computes its tokens anew."""
        LOG.warning(
            "preempted %s: %d of its tokens are to be computed again, %d sequences run, %d wait",
            victim.request.request_id, victim.computed, len(self.running) - 1, len(self.waiting) + 1,
        )  # fmt: skip
        self._counts["preemptions"] += 1
        self._sent_back.add(victim.order)
        part = self._slices.pop(victim.slot, None) if victim.slot is not None else None
        self._budget += part.count if part else 0
        victim.redo = victim.computed
        victim.preemptions += 1
        self._release(victim)
        victim.computed = 0
        self.waiting.push(victim)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.pool.give_back(sequence.block_ids)
        sequence.block_ids = []
        del self.running[sequence.slot]
        self._prefixes.leave(sequence)
        self._slots.append(sequence.slot)
        self._released.append(sequence.slot)
        sequence.slot = None

    def _batch(self) -> Batch | None:
        """The step as decided; what it samples is pending from now on."""
        if not self._slices:
            return None
        for part in self._slices.values():
            part.sequence.computed += part.count
            part.sequence.pending += part.samples
        self._steps += 1
        batch = Batch(self._steps, tuple(self._slices.values()), tuple(self._admitted), tuple(self._released))
        self._released = []
        return batch
