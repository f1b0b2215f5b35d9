"""Rows that share beginnings: every token once, and each sees its own past alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.eval.packing import ROW_TOKENS, Row, batches, common_start, pack

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=20)
CPU = torch.device("cpu")


def held(rows: list[Row]) -> dict[int, tuple[list[int], list[int]]]:
    """What each sequence's path spells out: tokens and positions."""
    return {
        index: ([row.tokens[i] for i in path], [row.positions[i] for i in path])
        for row in rows
        for index, path in row.paths.items()
    }


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_every_sequence_is_in_one_row_at_its_own_positions(sequences):
    rows = pack(sequences)
    assert held(rows) == {i: (sequence, list(range(len(sequence)))) for i, sequence in enumerate(sequences)}
    assert sum(len(row.paths) for row in rows) == len(sequences)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_a_token_sees_its_ancestors_and_itself(sequences):
    rows = pack(sequences)
    (batch,) = batches(rows, len(rows), CPU)
    mask = batch.mask(None)[:, 0]
    for number, row in enumerate(batch.rows):
        for path in row.paths.values():
            for depth, node in enumerate(path):
                assert mask[number, node].nonzero().flatten().tolist() == path[: depth + 1]
        padding = range(len(row.tokens), mask.shape[1])
        assert [mask[number, node].nonzero().flatten().tolist() for node in padding] == [[node] for node in padding]


@settings(max_examples=50, deadline=None)
@given(SEQUENCES, st.integers(1, 6))
def test_a_window_hides_what_lies_further_back_in_the_sequence(sequences, window):
    (batch,) = batches(pack(sequences), 99, CPU)
    mask = batch.mask(window)[:, 0]
    for number, row in enumerate(batch.rows):
        for path in row.paths.values():
            for depth, node in enumerate(path):
                seen = path[max(0, depth + 1 - window) : depth + 1]
                assert mask[number, node].nonzero().flatten().tolist() == seen


def test_the_choices_of_a_question_share_it():
    question = list(range(100))
    rows = pack([[*question, 7, 8], [*question, 7, 9, 1], [*question, 5], question])
    assert [len(row.tokens) for row in rows] == [100 + 4 + 1]
    assert rows[0].branches


def test_sequences_with_little_in_common_stay_apart():
    rows = pack([[1, 2, *range(10, 40)], [1, 2, *range(50, 80)]])
    assert [len(row.tokens) for row in rows] == [32, 32]
    assert not any(row.branches for row in rows)


def test_a_row_holds_only_so_much():
    start = list(range(100))
    rows = pack([[*start, 100 + i, *range(60)] for i in range(20)])
    assert max(len(row.tokens) for row in rows) <= ROW_TOKENS
    assert sum(len(row.tokens) for row in rows) < 20 * 100


def test_long_examples_are_shared_beyond_a_rows_usual_length():
    examples = list(range(ROW_TOKENS))
    rows = pack([[*examples, 1000 + i] for i in range(50)])
    assert [len(row.tokens) for row in rows] == [ROW_TOKENS + 50]


def test_equal_sequences_take_no_more_room_than_one():
    rows = pack([[3, 1, 4]] * 5)
    assert [row.tokens for row in rows] == [[3, 1, 4]]
    assert set(rows[0].paths) == set(range(5))


def test_batches_hold_the_longest_rows_first_and_fewer_of_them_when_they_are_long():
    long, short = list(range(2 * ROW_TOKENS)), [[1000 + i] * 4 for i in range(5)]
    found = [[len(row.tokens) for row in batch.rows] for batch in batches(pack([*short, long]), 4, CPU)]
    assert found == [[2 * ROW_TOKENS, 4], [4, 4, 4, 4]]


def test_common_start():
    assert common_start([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_start([1, 2], [1, 2, 3]) == 2
    assert common_start([], [1]) == 0
