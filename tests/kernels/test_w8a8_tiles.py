"""The choice of W8A8 tiles: the data file says what it should, and the rule for the rest gives tiles that can run."""

import json

import pytest

from quantlab_kernels.hopper import SHARED_BYTES
from quantlab_kernels.w8a8_tiles import (
    MEASURED,
    DotTile,
    OneTokenTile,
    WgmmaTile,
    likely_tile,
    measured_tile,
    measured_tiles,
    tile_from_json,
    tile_to_json,
)

SHAPES = [(1, 128), (64, 32), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (151936, 896), (57344, 8192)]
TOKENS = [2, 8, 9, 16, 17, 33, 65, 97, 129, 192, 257, 513, 1000, 4096, 100_000]


def assert_can_run(tile: WgmmaTile, columns: int) -> None:
    assert tile.stages >= 3
    assert tile.stages * tile.chunks * 128 * (tile.tokens + tile.rows) <= SHARED_BYTES // tile.resident
    assert (tile.warps + 4) * 32 * tile.registers * tile.resident <= 65536
    assert tile.rows * tile.tokens // (32 * tile.warps) <= 128  # accumulators a thread
    assert tile.split <= max(1, -(-columns // (128 * tile.chunks)))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_likely_tile_on_hopper_fits_the_processor(shape, tokens):
    tile = likely_tile(*shape, tokens, (DotTile, OneTokenTile, WgmmaTile), 132)
    assert isinstance(tile, WgmmaTile)
    assert_can_run(tile, shape[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_token_takes_a_kernel_of_its_own_and_other_gpus_the_plain_one(shape):
    assert isinstance(likely_tile(*shape, 1, (DotTile, OneTokenTile), 108), OneTokenTile)
    assert isinstance(likely_tile(*shape, 2, (DotTile, OneTokenTile), 108), DotTile)
    assert isinstance(likely_tile(*shape, 1, (DotTile,), 1), DotTile)


def test_measured_tiles_fit_and_ascend():
    for (_, _, columns), entries in measured_tiles().items():
        tokens = [count for count, _ in entries]
        assert tokens == sorted(set(tokens))
        for count, tile in entries:
            assert isinstance(tile, OneTokenTile if count == 1 else WgmmaTile)
            if isinstance(tile, WgmmaTile):
                assert_can_run(tile, columns)


def test_a_shape_or_gpu_that_was_never_measured_has_no_measured_tile():
    assert measured_tile("Another GPU", 4096, 4096, 1) is None
    assert measured_tile("NVIDIA H200", 4097, 4096, 1) is None


def test_tiles_survive_the_data_file():
    for tile in (DotTile(16, 64), OneTokenTile(8, 1024, 4), WgmmaTile(4, 2, 128, 1, 0, 2)):
        assert tile_from_json(json.loads(json.dumps(tile_to_json(tile)))) == tile


def test_the_data_file_is_one_entry_a_line():
    lines = MEASURED.read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]"
    assert len(lines) - 2 == len(json.loads(MEASURED.read_text()))
