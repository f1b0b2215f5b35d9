"""Who makes which piece: the kernels' own schedule, run with plain numbers for every program of a launch."""

from collections import defaultdict
from types import FunctionType, SimpleNamespace

import pytest

from quantlab_kernels import gluon_schedule
from quantlab_kernels.gluon_schedule import program_count, streamed_tiles

NUMBERS = SimpleNamespace(where=lambda condition, a, b: a if condition else b, minimum=min)
# Row tiles, token tiles, stages of a tile, split (0: shared evenly), slots of the GPU.
LAUNCHES = [
    (32, 1, 32, 0, 132), (224, 1, 32, 0, 132), (48, 2, 32, 0, 132), (32, 3, 112, 0, 132), (133, 1, 5, 0, 132),
    (264, 1, 8, 0, 132), (7, 1, 3, 0, 132), (1, 1, 1, 0, 132), (100, 9, 16, 0, 264), (64, 2, 64, 8, 660),
    (32, 1, 33, 5, 396), (224, 16, 32, 1, 132), (3, 1, 4, 1, 132), (40, 20, 32, 0, 132),
]  # fmt: skip


def on_numbers(name: str, **constants: int) -> FunctionType:
    """The source of a Gluon function, to be called with integers."""
    function = getattr(gluon_schedule, name).fn
    return FunctionType(function.__code__, {**function.__globals__, "gl": NUMBERS, **constants})


span, piece, sharers = (on_numbers(name) for name in ("span", "piece", "sharers"))


def pieces_of(tiles: int, stages: int, split: int, slots: int) -> dict[int, list[tuple[int, int, int, int]]]:
    """tile -> (program, first stage, stages, number of the piece among the program's) of all programs."""
    streamed, programs = streamed_tiles(tiles, split, slots), program_count(tiles, split, slots, stages)
    made = defaultdict(list)
    for program in range(programs):
        at, end, limit = span(program, programs, tiles, streamed, stages)
        assert at < limit  # a program without work would multiply nothing, which WGMMA must not
        order = 0
        while at < limit:
            tile, first, count = piece(at, end, program, programs, streamed, stages)
            assert count > 0
            made[tile].append((program, first, count, order))
            at, order = at + count, order + 1
    return made


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_every_stage_of_every_tile_is_made_once(launch):
    row_tiles, token_tiles, stages, split, slots = launch
    made = pieces_of(row_tiles * token_tiles, stages, split, slots)
    assert sorted(made) == list(range(row_tiles * token_tiles))
    for parts in made.values():
        assert sorted(i for _, first, count, _ in parts for i in range(first, first + count)) == list(range(stages))


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_programs_that_share_a_tile_are_neighbours_in_the_order_of_k(launch):
    row_tiles, token_tiles, stages, split, slots = launch
    tiles = row_tiles * token_tiles
    streamed, programs = streamed_tiles(tiles, split, slots), program_count(tiles, split, slots, stages)
    for tile, parts in pieces_of(tiles, stages, split, slots).items():
        if tile < streamed:
            first, count = sharers(tile, programs, streamed, stages)
            assert [program for program, *_ in parts] == list(range(first, first + count))
            assert [begin for _, begin, _, _ in parts] == sorted(begin for _, begin, _, _ in parts)
        else:
            assert len(parts) == 1


@pytest.mark.parametrize("launch", [launch for launch in LAUNCHES if not launch[3]], ids=str)
def test_a_program_leaves_at_most_one_beginning_and_one_end_of_a_tile(launch):
    row_tiles, token_tiles, stages, split, slots = launch
    rooms = [
        (program, first == 0)
        for parts in pieces_of(row_tiles * token_tiles, stages, split, slots).values()
        for program, first, count, _ in parts
        if count < stages
    ]
    assert len(rooms) == len(set(rooms))


@pytest.mark.parametrize("launch", [launch for launch in LAUNCHES if not launch[3]], ids=str)
def test_shared_evenly_no_program_has_more_than_one_stage_more_than_another(launch):
    row_tiles, token_tiles, stages, split, slots = launch
    work: dict[int, int] = defaultdict(int)
    for parts in pieces_of(row_tiles * token_tiles, stages, split, slots).values():
        for program, _, count, _ in parts:
            work[program] += count
    assert max(work.values()) - min(work.values()) <= 1


def test_tiles_are_placed_once_each_in_bands_of_tokens():
    place = on_numbers("place", TOKEN_TILES=8)
    for row_tiles, token_tiles in ((1, 1), (5, 8), (7, 19), (224, 3)):
        places = [place(tile, row_tiles, token_tiles) for tile in range(row_tiles * token_tiles)]
        assert sorted(places) == [(row, token) for row in range(row_tiles) for token in range(token_tiles)]
        assert all(token < 8 for _, token in places[: row_tiles * min(8, token_tiles)])
