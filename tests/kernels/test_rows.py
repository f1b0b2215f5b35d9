"""Room behind activations: as much as tiles are wide, and never a row that the storage does not hold."""

import pytest
import torch

from quantlab_kernels.rows import empty_rows, padded, readable_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "rows"), [(0, 0), (1, 8), (8, 8), (9, 16), (33, 64), (129, 256), (256, 256), (257, 512), (8192, 8192)]
)
def test_rows_are_padded_to_the_width_of_tiles(tokens, rows):
    assert padded(tokens) == rows
    x = empty_rows(tokens, 32, torch.float16, CPU)
    assert x.shape == (tokens, 32) and x.is_contiguous()
    assert x.untyped_storage().nbytes() == rows * 64


def test_what_is_readable_ends_with_the_tile_or_the_storage():
    assert readable_rows(empty_rows(33, 32, torch.float16, CPU), 64) == 64
    assert readable_rows(empty_rows(33, 32, torch.float16, CPU), 48) == 48
    assert readable_rows(torch.empty(33, 32), 64) == 33
    assert readable_rows(torch.empty(40, 32)[:33], 64) == 40
    assert readable_rows(torch.empty(40, 32)[30:33], 16) == 10
    assert readable_rows(torch.empty(64, 32)[30:33], 16) == 16


def test_part_of_a_row_behind_the_last_is_not_a_row():
    assert readable_rows(torch.empty(5 * 32 + 31)[: 4 * 32].view(4, 32), 8) == 5
