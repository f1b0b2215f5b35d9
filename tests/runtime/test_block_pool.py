"""Blocks: nobody holds what is free, prefixes stay known while there is room, and the tokens decide what is one."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quantlab.runtime.block_pool import BlockKey, BlockPool, block_keys

SIZE = 2


def keys(*tokens: int, salt: str = "") -> list[BlockKey]:
    return block_keys([], tokens, SIZE, salt)


def hold(pool: BlockPool, *tokens: int) -> list[int]:
    """Blocks of a sequence whose full ones are known."""
    blocks = pool.take(-(-len(tokens) // SIZE))
    for block, key in zip(blocks, keys(*tokens), strict=False):
        pool.know(block, key)
    return blocks


def test_keys_are_of_full_blocks_and_of_all_that_comes_before() -> None:
    assert [content for _, content in keys(1, 2, 3, 4, 5)] == [content for _, content in keys(1, 2, 3, 4)]
    assert len(keys(1, 2, 3, 4, 5)) == 2
    assert keys(1, 2, 3, 4)[1] != keys(2, 1, 3, 4)[1]
    assert keys(1, 2)[0] != keys(1, 3)[0]


def test_keys_are_the_same_however_many_are_made_at_once() -> None:
    first = keys(1, 2)
    assert first + block_keys(first, (3, 4, 5, 6), SIZE, "") == keys(1, 2, 3, 4, 5, 6)


@given(st.text(), st.text())
def test_salts_share_nothing_unless_they_are_equal(one: str, other: str) -> None:
    assert (keys(1, 2, salt=one) == keys(1, 2, salt=other)) == (one == other)


def test_a_lone_surrogate_is_a_salt_like_any_other() -> None:
    assert keys(1, 2, salt="\udc80") != keys(1, 2, salt="")


def test_a_known_beginning_is_found_and_no_more() -> None:
    pool = BlockPool(8)
    blocks = hold(pool, 1, 2, 3, 4, 5, 6)
    assert pool.find(keys(1, 2, 3, 4, 9, 9)) == blocks[:2]
    assert pool.find(keys(9, 2, 3, 4)) == []


def test_a_digest_that_happens_to_be_equal_is_no_hit() -> None:
    pool = BlockPool(4)
    (block,) = pool.take(1)
    (digest, content), (_, other) = keys(1, 2)[0], keys(3, 4)[0]
    pool.know(block, (digest, other))
    assert pool.find([(digest, content)]) == []
    assert pool.find([(digest, other)]) == [block]


def test_a_prefix_stays_known_after_its_last_holder_until_its_blocks_are_taken() -> None:
    pool = BlockPool(4)
    blocks = hold(pool, 1, 2, 3, 4)
    pool.give_back(blocks)
    assert pool.free == 4
    assert pool.find(keys(1, 2, 3, 4)) == blocks
    pool.share(blocks)
    assert pool.free == 2
    pool.give_back(blocks)
    pool.take(4)
    assert pool.find(keys(1, 2, 3, 4)) == []


def test_blocks_that_hold_nothing_known_go_first_then_the_least_recently_used_from_their_end() -> None:
    pool = BlockPool(6)
    old, new = hold(pool, 1, 2, 3, 4), hold(pool, 5, 6, 7, 8)
    unknown = pool.take(2)
    pool.give_back(old)
    pool.give_back(new)
    pool.give_back(unknown)
    assert set(pool.take(2)) == set(unknown)
    assert pool.take(4) == [old[1], old[0], new[1], new[0]]


def test_using_a_prefix_again_makes_it_the_last_to_go() -> None:
    pool = BlockPool(4)
    first, second = hold(pool, 1, 2), hold(pool, 3, 4)
    third = pool.take(2)
    pool.give_back(first)
    pool.give_back(second)
    pool.share(first)
    pool.give_back(first)
    assert pool.take(2) == [*second, *first]
    pool.check_integrity([first, second, third])


def test_two_blocks_of_the_same_tokens_are_known_once() -> None:
    pool = BlockPool(4)
    first, second = hold(pool, 1, 2), hold(pool, 1, 2)
    assert pool.find(keys(1, 2)) == first
    pool.give_back(second)
    pool.check_integrity([first])


def test_what_is_forgotten_is_not_found_and_goes_first() -> None:
    pool = BlockPool(4)
    blocks, other = hold(pool, 1, 2), hold(pool, 3, 4)
    pool.give_back(blocks)
    pool.give_back(other)
    pool.take(2)
    pool.forget(keys(3, 4))
    assert pool.find(keys(3, 4)) == []
    assert pool.take(1) == other


def test_shared_blocks_count_as_gained_by_nobody() -> None:
    pool = BlockPool(4)
    blocks = hold(pool, 1, 2, 3, 4)
    pool.share(blocks[:1])
    assert pool.alone(blocks) == 1
    assert pool.idle(blocks) == 0


class Walk(RuleBasedStateMachine):
    """Sequences come, share, grow and go; what is found always holds the tokens asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=9), salt=st.sampled_from(["", "a"]))
    def come(self, tokens: list[int], salt: str) -> None:
        names = keys(*tokens, salt=salt)
        hits = self.pool.find(names)
        for index, block in enumerate(hits):
            assert self.content[block] == (salt, *tokens[: (index + 1) * SIZE])
        new = -(-len(tokens) // SIZE) - len(hits)
        if new + self.pool.idle(hits) > self.pool.free:
            return
        self.pool.share(hits)
        blocks = hits + self.pool.take(new)
        for index in range(len(hits), len(names)):
            self.content[blocks[index]] = (salt, *tokens[: (index + 1) * SIZE])  # type: ignore[assignment]
            self.pool.know(blocks[index], names[index])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.pool.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(tokens=st.lists(st.integers(0, 2), min_size=2, max_size=6))
    def forget(self, tokens: list[int]) -> None:
        self.pool.forget(keys(*tokens))
        assert not self.pool.find(keys(*tokens))

    @invariant()
    def adds_up(self) -> None:
        self.pool.check_integrity(self.held)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
