"""The bits on disk: golden vectors, compressed-tensors as a second opinion, and round trips over every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab_kernels.layout import (
    QuantizedWeight,
    pack_int4,
    pack_int8,
    pack_zeros,
    pack_zeros8,
    unpack_int4,
    unpack_int8,
    unpack_zeros,
    unpack_zeros8,
)

NIBBLES = torch.arange(-8, 8, dtype=torch.int8)
sizes = st.integers(min_value=1, max_value=70)
seeds = st.integers(min_value=0, max_value=2**31)


def codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


def hexes(words: Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def test_sixteen_nibbles_in_a_row_fill_two_words_least_significant_first():
    words = pack_int4(NIBBLES[None])
    assert words.dtype == torch.int32 and words.shape == (1, 2)
    assert hexes(words) == ["76543210", "fedcba98"]


def test_sixteen_zero_points_down_a_column_fill_two_words():
    words = pack_zeros(NIBBLES[:, None])
    assert words.shape == (2, 1)
    assert hexes(words) == ["76543210", "fedcba98"]


def test_four_bytes_fill_a_word():
    assert hexes(pack_int8(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8))) == ["ff807f00"]


def test_the_last_word_of_a_row_ends_in_zero_bits():
    assert hexes(pack_int4(torch.full((1, 3), 7, dtype=torch.int8))) == ["00000fff"]


@given(rows=sizes, columns=sizes, seed=seeds)
def test_int4_codes_come_back(rows: int, columns: int, seed: int):
    original = codes(rows, columns, 4, seed)
    assert torch.equal(unpack_int4(pack_int4(original), columns), original)


@given(rows=sizes, columns=sizes, seed=seeds)
def test_int8_codes_come_back(rows: int, columns: int, seed: int):
    original = codes(rows, columns, 8, seed)
    assert torch.equal(unpack_int8(pack_int8(original), columns), original)


@given(rows=sizes, groups=sizes, seed=seeds)
def test_zero_points_come_back(rows: int, groups: int, seed: int):
    narrow, wide = codes(rows, groups, 4, seed), codes(rows, groups, 8, seed)
    assert torch.equal(unpack_zeros(pack_zeros(narrow), rows), narrow)
    assert torch.equal(unpack_zeros8(pack_zeros8(wide), rows), wide)


@given(rows=sizes, columns=sizes, seed=seeds)
def test_any_words_survive_unpacking_and_packing(rows: int, columns: int, seed: int):
    words = torch.randint(-(2**31), 2**31, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = words.to(torch.int32)
    assert torch.equal(pack_int4(unpack_int4(words, 8 * columns)), words)
    assert torch.equal(pack_int8(unpack_int8(words, 4 * columns)), words)


def test_strided_codes_pack_like_contiguous_ones():
    wide = codes(24, 40, 4, seed=1)
    for view in (wide.t(), wide[::2, 1:33], wide[:1].t(), wide[:, :1].t()):
        assert torch.equal(pack_int4(view), pack_int4(view.clone(memory_format=torch.contiguous_format)))
        assert torch.equal(pack_int8(view), pack_int8(view.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (16, 33), (7, 256), (9, 127)])
def test_words_are_those_of_compressed_tensors(bits: int, rows: int, columns: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    original = codes(rows, columns, bits, seed=rows * columns)
    pack, pack_down = (pack_int4, pack_zeros) if bits == 4 else (pack_int8, pack_zeros8)
    assert torch.equal(pack(original), helpers.pack_to_int32(original, bits))
    assert torch.equal(pack_down(original), helpers.pack_to_int32(original, bits, packed_dim=0))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_weight_refuses_scales_that_do_not_cover_its_columns(groups: int):
    with pytest.raises(AssertionError):
        QuantizedWeight(codes(4, 64, 4, 0), torch.ones(4, groups), None, 32)
