"""The choice of W4A16 tiles: the data file says what it should, and the rule for the rest gives tiles that can run."""

import json

import pytest
import torch

from quantlab_kernels.hopper import SHARED_BYTES
from quantlab_kernels.w4a16 import GLUON_RELEASES, choose_tile, supported_kernels
from quantlab_kernels.w4a16_heuristic import likely_tile
from quantlab_kernels.w4a16_tiles import (
    MEASURED,
    DecodeTile,
    GluonTile,
    PlainTile,
    measured_tile,
    measured_tiles,
    tile_from_json,
    tile_to_json,
)

ALL = (PlainTile, DecodeTile, GluonTile)
SHAPES = [(1, 128), (64, 32), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (151936, 896), (57344, 8192)]
TOKENS = [1, 8, 9, 16, 17, 33, 65, 97, 129, 192, 193, 257, 513, 1000, 4096, 8192, 100_000]


def assert_can_run(tile: GluonTile, columns: int, bits: int = 4) -> None:
    assert tile.stages(bits) >= 3
    stage = tile.ring_chunks(bits) * (tile.columns * 128 + tile.rows * 8 * bits)
    assert tile.chunks % tile.ring_chunks(bits) == 0
    assert tile.stages(bits) * stage <= SHARED_BYTES // tile.resident
    assert (tile.warps + 4) * 32 * tile.registers * tile.resident <= 65536
    assert tile.split <= max(1, -(-columns // (64 * tile.chunks)))
    assert tile.row_blocks == 1 or not tile.more_tokens
    assert tile.row_blocks * tile.chunks >= 2  # one batch an iteration overwrites operands in flight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_likely_tile_on_hopper_fits_the_processor(shape, tokens, bits):
    tile = likely_tile(*shape, tokens, ALL, 132, bits)
    assert isinstance(tile, GluonTile)
    assert_can_run(tile, shape[1], bits)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_elsewhere_few_tokens_take_mma_and_many_the_plain_kernel(shape, tokens):
    assert isinstance(
        likely_tile(*shape, tokens, (PlainTile, DecodeTile), 108), DecodeTile if tokens <= 16 else PlainTile
    )
    assert isinstance(likely_tile(*shape, tokens, (PlainTile,), 1), PlainTile)


def test_measured_tiles_fit_and_ascend():
    found = measured_tiles()
    assert found
    for (_, _, columns), entries in found.items():
        tokens = [count for count, _ in entries]
        assert tokens == sorted(set(tokens))
        for count, tile in entries:
            assert isinstance(tile, GluonTile) and tile.columns * 4 > min(count, 256)
            assert_can_run(tile, columns)


def test_a_number_of_tokens_takes_the_measurement_of_the_next_larger_one():
    (gpu, rows, columns), entries = next(iter(measured_tiles().items()))
    for (below, _), (count, tile) in zip(entries, entries[1:], strict=False):
        assert measured_tile(gpu, rows, columns, below + 1) == tile == measured_tile(gpu, rows, columns, count)
    assert measured_tile(gpu, rows, columns, entries[-1][0] + 1) is None
    assert measured_tile("Another GPU", rows, columns, 1) is None
    assert measured_tile(gpu, rows + 1, columns, 1) is None


def test_tiles_survive_the_data_file():
    for tile in (PlainTile(2, 64), DecodeTile(4, 2, 8, 3), GluonTile(8, 1, 64, 32, 2, 4, 1)):
        assert tile_from_json(json.loads(json.dumps(tile_to_json(tile)))) == tile


def test_the_data_file_is_one_entry_a_line():
    lines = MEASURED.read_text().splitlines()
    assert lines[0] == "[" and lines[-1] == "]"
    assert len(lines) - 2 == len(json.loads(MEASURED.read_text()))


def test_a_cpu_runs_what_its_mode_allows():
    device = torch.device("cpu")
    assert PlainTile in supported_kernels(device) and GluonTile not in supported_kernels(device)
    assert type(choose_tile(64, 128, 1, device)) in supported_kernels(device)
    assert isinstance(choose_tile(64, 128, 1, device, bits=8), PlainTile)


def test_the_releases_that_the_gluon_kernel_was_checked_for_are_named_by_minor_version():
    assert all(release.count(".") == 1 for release in GLUON_RELEASES)
