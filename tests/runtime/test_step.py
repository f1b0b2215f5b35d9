"""What a step's tensors hold for which slices."""

import pytest
import torch

from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.request import SamplingParams
from quantlab.runtime.step import Frame, unpack, wanted_rows
from quantlab.runtime.step_builder import StepBuilder
from tests.runtime.steps import batch, sequence


def builder() -> StepBuilder:
    return StepBuilder(max_num_seqs=4, max_blocks=3, block_size=16, device=torch.device("cpu"))


def test_tokens_come_from_prompt_and_output_with_their_positions_and_places() -> None:
    one = sequence("a", [50, 51, 52], [4, 2], slot=1)
    one.output_ids = [60 + i for i in range(20)]
    step = builder().build(batch((one, 1, 17), admitted=(one,)), [16])
    assert step.ids.tolist() == [51, 52, *range(60, 75)]
    assert step.positions.tolist() == list(range(1, 18))
    assert step.cache_slots.tolist() == [*range(4 * 16 + 1, 5 * 16), 2 * 16, 2 * 16 + 1]
    assert (step.lengths.tolist(), step.starts.tolist(), step.rows.tolist()) == ([18], [0, 17], [16])
    assert (step.longest, step.max_length, step.slots.tolist()) == (17, 18, [1])


def test_the_newest_token_may_be_one_that_the_host_does_not_know() -> None:
    one = sequence("a", [50, 51], [4], slot=3)
    assert builder().build(batch((one, 1, 2), admitted=(one,)), []).ids.tolist() == [51, -1 - 3]
    with pytest.raises(AssertionError, match="newest"):
        builder().build(batch((one, 1, 3), admitted=(one,)), [])


def test_tables_learn_new_blocks_and_forget_those_of_the_last_owner() -> None:
    steps = builder()
    first = sequence("a", list(range(40)), [7], slot=0)
    steps.build(batch((first, 0, 16), admitted=(first,)), [])
    first.block_ids += [8, 9]
    steps.build(batch((first, 16, 20)), [])
    assert steps.tables[0].tolist() == [7, 8, 9, 0]
    second = sequence("b", list(range(20)), [5, 6], slot=0)
    steps.build(batch((second, 0, 20), admitted=(second,)), [])
    assert steps.tables[0, :2].tolist() == [5, 6]


def test_padding_writes_nowhere_and_attends_to_nothing() -> None:
    one, two = sequence("a", [5], [1], slot=0), sequence("b", [6], [2], slot=2)
    frame, steps = Frame(4), builder()
    vector = torch.full((frame.vector_size,), 99)
    parts = (Slice(two, 0, 1, True), Slice(one, 0, 1, True))
    assert steps.fill(Batch(1, parts, (one, two)), frame, vector) == [0, 1]
    step = unpack(vector, frame.shape(48))
    assert step.ids.tolist() == [6, 5, 0, 0]
    assert step.cache_slots.tolist() == [32, 16, -1, -1]
    assert step.lengths.tolist() == [1, 1, 0, 0]
    assert step.slots.tolist() == [2, 0, 4, 4]
    assert step.starts.tolist() == [0, 1, 2, 3, 4]
    assert step.rows.tolist() == [0, 1, 2, 3]
    assert (step.singles, step.longest, step.every_row) == (4, 1, True)


def test_a_frame_holds_singles_and_pieces_of_prompts_with_padding_behind_each() -> None:
    chunk, one = sequence("a", list(range(50, 70)), [1, 3], slot=0), sequence("b", [60, 61], [2], slot=1)
    frame, steps = Frame(2, 3, 8), builder()
    vector = torch.full((frame.vector_size,), 99)
    parts = (Slice(chunk, 14, 4, True), Slice(one, 1, 1, True))
    assert steps.fill(Batch(1, parts, (chunk, one)), frame, vector) == [2, 0]  # the chunk's row comes behind singles
    step = unpack(vector, frame.shape(48))
    assert step.ids.tolist() == [61, 0, 64, 65, 66, 67, 0, 0, 0, 0]
    assert step.positions.tolist() == [1, 0, 14, 15, 16, 17, 0, 0, 0, 0]
    assert step.cache_slots.tolist() == [33, -1, 30, 31, 48, 49, -1, -1, -1, -1]
    assert step.lengths.tolist() == [2, 0, 18, 0, 0]
    assert step.slots.tolist() == [1, 4, 0, 4, 4]
    assert step.starts.tolist() == [0, 1, 2, 6, 6, 6]
    assert step.rows.tolist() == [0, 1, 5, 0, 0]
    assert (step.singles, step.longest, step.every_row) == (2, 8, False)
    idle = unpack(steps.idle(frame), frame.shape(48))
    assert idle.lengths.tolist() == [0] * 5 and set(idle.cache_slots.tolist()) == {-1}


def test_slices_of_one_token_come_first_and_rows_move_with_them() -> None:
    chunk, one = sequence("a", [50, 51, 52, 53], [1], slot=0), sequence("b", [60], [2], slot=1)
    step = builder().build(batch((chunk, 0, 4), (one, 0, 1), admitted=(chunk, one)), [1, 3, 4])
    assert step.ids.tolist() == [60, 50, 51, 52, 53]
    assert (step.starts.tolist(), step.slots.tolist()) == ([0, 1, 5], [1, 0])
    assert step.rows.tolist() == [2, 4, 0]
    assert (step.singles, step.max_single_length, step.max_length, step.every_row) == (1, 1, 4, False)
    every = builder().build(batch((chunk, 0, 4), (one, 0, 1), admitted=(chunk, one)), range(5))
    assert not every.every_row  # all rows, but in another order


def test_rows_are_those_that_are_sampled_and_those_before_prompt_tokens_asked_for() -> None:
    plain = sequence("a", [1, 2, 3], [0], slot=0)
    asks = sequence("b", [1, 2, 3, 4], [1], slot=1, params=SamplingParams(prompt_logprobs=2))
    parts = (Slice(plain, 0, 3, True), Slice(asks, 0, 2, False), Slice(asks, 2, 2, True))
    wanted = wanted_rows(parts)
    assert wanted.rows == [2, 3, 4, 5, 6]  # the last row of the last slice follows the prompt's last token
    assert wanted.sampling == [0, 4]
    assert wanted.prompts == {1: (1, 3), 2: (3, 4)}
    assert wanted_rows(Batch(1, (Slice(plain, 0, 2, False),)).slices).rows == []
