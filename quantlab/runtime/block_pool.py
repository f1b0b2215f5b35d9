"""The blocks that hold keys and values: who holds which, which are free, and which still hold a known prefix.

Numbers only; the tensors are the runner's. Knows nothing about requests, scheduling or devices.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockKey = tuple[bytes, bytes]  # the digest of a block and all before it; the block's own tokens
DIGEST_BYTES = 16


def block_keys(known: list[BlockKey], tokens: Sequence[int], block_size: int, salt: str) -> list[BlockKey]:
    """Keys of the full blocks of `tokens`, which follow those of `known`; `salt` separates what must not be shared.

    Each digest is that of the one before it and the block's tokens, so equal keys mean equal beginnings.
    """
    parent = (
        known[-1][0] if known else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
    )
    keys = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        content = array("I", tokens[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=DIGEST_BYTES).digest()
        keys.append((parent, content))
    return keys


class BlockPool:
    """`num_blocks` blocks with a count of holders each.

    A block without a holder is free. Free blocks form a linked list (an OrderedDict is one) from the next to be taken
    to the last: those that hold nothing known in front, then the least recently used. A free block keeps its key until
    it is taken, so a prefix stays known as long as there is room for it. All steps are O(1) per block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free blocks, now held once each and known by no key; the caller has checked that they are there."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            self._forget(block)
        return taken

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks that hold the longest known beginning of `keys`; nobody's count changes."""
        found = []
        for digest, content in keys:
            block = self._known.get(digest)
            # The tokens decide: what happens to have the same digest is not the same prefix.
            if block is None or self._keys[block] != (digest, content):
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free."""
        return sum(not self._holders[block] for block in blocks)

    def alone(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` would be free if one holder let them go."""
        return sum(self._holders[block] == 1 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each of `blocks`, free or not."""
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder of each of `blocks`, a sequence's in order, lets go.

        The end of a sequence is taken before its beginning, which more requests will share.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def know(self, block: int, key: BlockKey) -> None:
        """`block`, held and computed, can be found by `key` from now, unless another one can."""
        if self._keys[block] is None and key[0] not in self._known:
            self._keys[block] = key
            self._known[key[0]] = block

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """What goes by `keys` is not to be found any more."""
        for digest, _ in keys:
            block = self._known.get(digest)
            if block is not None:
                self._forget(block)
                if not self._holders[block]:
                    self._free.move_to_end(block, last=False)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._known[key[0]]
            self._keys[block] = None

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Asserts that the blocks that sequences hold, those free and those free but known are all blocks there are."""
        counts = Counter(block for blocks in held for block in blocks)
        assert [counts[block] for block in range(self.num_blocks)] == self._holders, "blocks are held by nobody known"
        assert set(self._free) == {block for block in range(self.num_blocks) if not self._holders[block]}
        known_free = sum(self._keys[block] is not None for block in self._free)
        unknown_free = len(self._free) - known_free
        assert unknown_free + known_free + len(counts) == self.num_blocks
        keyed = {key[0]: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._known, "a key leads to a block that does not hold it"
