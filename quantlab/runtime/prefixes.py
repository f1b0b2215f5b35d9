"""What of a sequence is computed already, or just being computed for another one.

Knows nothing about budgets, slots or turns.
"""

from quantlab.runtime.batch import Slice
from quantlab.runtime.block_pool import BlockPool, block_keys
from quantlab.runtime.request import Sequence

WORTH_WAITING = 64  # tokens: less than this is computed again sooner than it is waited for


class Prefixes:
    """The full blocks of sequences by their keys, in `pool`; not `enabled`, nobody shares anything."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self._pool = pool
        self._size = block_size
        self._enabled = enabled
        self._worth_blocks = -(-WORTH_WAITING // block_size)
        self._filling: dict[int, Sequence] = {}  # whose prompts are being computed, by order
        self._awaiting = -1  # who waits for one of them, by order

    def may_share(self, sequence: Sequence) -> bool:
        """Whether known blocks help: who asks for the prompt's log probabilities needs every position computed."""
        return self._enabled and sequence.request.params.prompt_logprobs is None

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of `sequence` already; its last token is never among them."""
        if not self.may_share(sequence):
            return []
        blocks = (sequence.length - 1) // self._size
        self._name_blocks(sequence, blocks)
        return self._pool.find(sequence.keys[:blocks])

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a good part of `sequence`, which waits, will be known in a step or two."""
        if not self._filling or not self.may_share(sequence):
            return False
        # Who waits already waits to the end. Equal keys mean that all before them is equal too.
        at = len(self.find(sequence)) + (0 if self._awaiting == sequence.order else self._worth_blocks - 1)
        key = sequence.keys[at : at + 1]
        found = bool(key) and any(other.keys[at : at + 1] == key for other in self._filling.values())
        self._awaiting = sequence.order if found else -1
        return found

    def begin(self, sequence: Sequence) -> None:
        """`sequence`, whose blocks were looked for, computes the rest of its prompt from now on."""
        if self.may_share(sequence):
            self._filling[sequence.order] = sequence

    def computed(self, part: Slice) -> None:
        """The step of `part` has ended well: the blocks it filled can be found by who begins with the same tokens."""
        sequence, end = part.sequence, part.start + part.count
        first, last = part.start // self._size, end // self._size
        if self._filling and end >= sequence.prompt_length:
            self._filling.pop(sequence.order, None)
        # A sequence that was preempted meanwhile does not have these blocks any more.
        if self._enabled and first < last and sequence.slot is not None:
            self._name_blocks(sequence, last)
            for index in range(first, last):
                self._pool.know(sequence.block_ids[index], sequence.keys[index])

    def leave(self, sequence: Sequence) -> None:
        """`sequence` computes no more."""
        self._filling.pop(sequence.order, None)

    def forget(self, sequence: Sequence) -> None:
        """What was computed for `sequence` is wrong."""
        self._pool.forget(sequence.keys)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Asserts that only who runs is waited for."""
        assert self._filling.keys() <= {sequence.order for sequence in running}

    def _name_blocks(self, sequence: Sequence, count: int) -> None:
        """Make `sequence.keys` at least `count` long."""
        if len(sequence.keys) < count:
            tokens = sequence.tokens(len(sequence.keys) * self._size, count * self._size)
            sequence.keys += block_keys(sequence.keys, tokens, self._size, sequence.request.cache_salt)
