"""Warm-up asks for every tile: the numbers of tokens that it is given stand for all numbers up to the largest."""

import pytest

from quantlab_kernels import w4a16_heuristic, w4a16_tiles, w8a8_tiles
from quantlab_kernels.warm_up import token_counts

SHAPES = [(4096, 4096), (28672, 4096), (4096, 14336), (1000, 896)]
GPU = "NVIDIA H200"


def w4a16_tile(rows: int, columns: int, tokens: int, bits: int) -> w4a16_tiles.Tile:
    kinds = (w4a16_tiles.PlainTile, w4a16_tiles.DecodeTile, w4a16_tiles.GluonTile)
    measured = w4a16_tiles.measured_tile(GPU, rows, columns, tokens) if bits == 4 else None
    return measured or w4a16_heuristic.likely_tile(rows, columns, tokens, kinds, 132, bits)


def w8a8_tile(rows: int, columns: int, tokens: int) -> w8a8_tiles.Tile:
    kinds = (w8a8_tiles.DotTile, w8a8_tiles.OneTokenTile, w8a8_tiles.WgmmaTile)
    measured = w8a8_tiles.measured_tile(GPU, rows, columns, tokens)
    return measured or w8a8_tiles.likely_tile(rows, columns, tokens, kinds, 132)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_counts_stand_for_all_numbers_of_tokens(shape):
    few, all_counts = token_counts(2200), range(1, 2201)
    for bits in (4, 8):
        assert {w4a16_tile(*shape, m, bits) for m in few} >= {w4a16_tile(*shape, m, bits) for m in all_counts}
    assert {w8a8_tile(*shape, m) for m in few} >= {w8a8_tile(*shape, m) for m in all_counts}


def test_the_counts_reach_the_largest_and_none_means_none():
    assert token_counts(0) == []
    assert token_counts(1) == [1, 16]
    assert token_counts(40) == [1, 8, 16, 32, 48]
