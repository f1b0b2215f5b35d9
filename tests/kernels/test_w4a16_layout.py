"""The kernel order of 4-bit weights: a permutation with an inverse, and words whose arithmetic gives the weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize
from quantlab_kernels.w4a16_layout import SUBNORMAL_EXPONENT, from_kernel, fuse_rows, kernel_group_size, to_kernel

DTYPES = [torch.float16, torch.bfloat16]


def weight(
    rows: int, columns: int, group: int, zeros: bool, dtype: torch.dtype, size: float = 0.01, bits: int = 4
) -> QuantizedWeight:
    groups, half = (rows, columns // group), 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    offsets = torch.randint(-half, half, groups, dtype=torch.int8) if zeros else None
    signs = torch.randint(0, 2, groups) * 2 - 1
    return QuantizedWeight(codes, (signs * (torch.rand(groups) + 0.5) * size).to(dtype), offsets, group)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    zeros=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([4, 8]),
)
def test_there_and_back_gives_the_same_weight(rows, groups, group, zeros, dtype, bits):
    q = weight(rows, groups * group, group, zeros, dtype, bits=bits)
    back = from_kernel(to_kernel(q, dtype, bits))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(dequantize(back), dequantize(q))


@pytest.mark.parametrize("columns", [8, 100, 128, 200, 384])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_group_a_row_may_have_any_length(columns, zeros):
    q = weight(70, columns, columns, zeros, torch.float16)
    back = from_kernel(to_kernel(q, torch.float16))
    assert torch.equal(dequantize(back), dequantize(q))


def test_a_code_lies_where_the_docstring_says():
    codes = torch.full((64, 128), -8, dtype=torch.int8)
    # row 16 w + 8 b1 + r: w = 2, b1 = 1, r = 5. Column 64 + 16 n + 8 b2 + 2 c + b0: n = 3, b2 = 1, c = 2, b0 = 1.
    codes[45, 64 + 48 + 8 + 4 + 1] = 3
    words = to_kernel(QuantizedWeight(codes, torch.ones(64, 1).half(), None, 128), torch.float16).words
    nonzero = words.view(2, 4, 8, 4, 2, 2, 2).nonzero().tolist()
    assert nonzero == [[1, 2, 5, 2, 1, 1, 1]]
    assert words.view(-1)[words.view(-1) != 0].item() & 0xFFFF == (3 + 8) << 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_byte_in_place_is_a_number_whose_fma_is_the_rounded_weight(zeros, dtype):
    """What the assembly computes for 8-bit codes: a byte below 16-bit exponents, subnormal or just above."""
    q = weight(64, 128, 128, zeros, dtype, bits=8)
    w = to_kernel(q, dtype, bits=8)
    unit = 2.0 ** -SUBNORMAL_EXPONENT[dtype]
    stored = w.scales[0, 0].permute(1, 2, 0).reshape(64, 1, 1).double()  # [r, w, b1] to rows
    words = w.words.view(4, 4, 8, 4, 2, 2, 2).permute(1, 5, 2, 0, 4, 3, 6).reshape(64, 4, 16).int() & 0xFFFF
    made = []
    for n in range(2):
        byte = ((words >> (8 * n)) & 0xFF).to(torch.int16).view(dtype).double()
        if w.zeros is None:
            made.append((byte * stored + (-128 * unit * stored).to(dtype).double()).to(dtype))
        else:
            minus = w.zeros[0, 0].permute(1, 2, 0).reshape(64, 1, 1).view(dtype).double()
            made.append(((byte + minus) * stored).to(dtype))
    exact = (q.codes.double() - (0 if q.zeros is None else q.zeros.double())) * q.scales.double()
    wanted = (exact * 2.0**-w.exponent).to(dtype).double()
    found = torch.stack(made, dim=2).view(64, 128).double()
    largest = wanted.abs().max()
    assert (found - wanted).abs().max() <= 2.0**-20 * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", [1e-5, 0.01, 3.0])
def test_the_arithmetic_of_the_kernels_gives_the_rounded_weight(size, zeros, dtype):
    """What the assembly computes, bit by bit: nibbles in place are subnormal numbers, one fma makes the weight."""
    q = weight(64, 128, 128, zeros, dtype, size)
    w = to_kernel(q, dtype)
    unit = 2.0 ** -SUBNORMAL_EXPONENT[dtype]
    stored = w.scales[0, 0].permute(1, 2, 0).reshape(64, 1).double()  # [r, w, b1] to rows
    words = w.words.view(2, 4, 8, 4, 2, 2, 2).permute(1, 5, 2, 0, 4, 3, 6).reshape(64, 2, 16).int() & 0xFFFF
    planes = []
    for n in range(4):
        high = n % 2
        masked = ((words >> (8 * (n // 2))) & (0xF0 if high else 0x0F)).to(torch.int16)
        nibble = masked.view(dtype).double()  # exactly what the tensor core instruction's register would hold
        scale = stored[:, :, None] * (0.0625 if high else 1.0)
        if w.zeros is None:
            value = nibble * scale + (-8 * unit * stored)[:, :, None].to(dtype).double()
        else:
            zero = (w.zeros[0, 0].permute(1, 2, 0).reshape(64, 1) & 15).to(torch.int16)
            minus = ((zero << 4 if high else zero) | -0x8000).view(dtype).double()
            value = (nibble + minus[:, :, None]) * scale
        planes.append(value.to(dtype))
    made = torch.stack(planes, dim=2).view(64, 128).double() * 2.0**w.exponent
    exact = (q.codes.double() - (0 if q.zeros is None else q.zeros.double())) * q.scales.double()
    assert ((made - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + exact.abs().max() * 2.0**-20).all()
    if dtype == torch.bfloat16:
        assert torch.equal(made.to(dtype), dequantize(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_keep_their_precision_whatever_their_size(dtype):
    for size in (1e-6, 1e-3, 1.0, 50.0):
        q = weight(64, 128, 128, False, dtype, size)
        w = to_kernel(q, dtype)
        assert torch.isfinite(w.scales).all()
        assert torch.equal(from_kernel(w).scales, q.scales)


def test_rows_are_fused_in_order():
    parts = [weight(rows, 256, 128, True, torch.float16) for rows in (64, 16, 16)]
    fused = fuse_rows(parts)
    assert torch.equal(dequantize(fused), torch.cat([dequantize(part) for part in parts]))


def test_weights_of_different_kinds_are_not_fused():
    with pytest.raises(ValueError, match="different kinds"):
        fuse_rows([weight(8, 256, 128, True, torch.float16), weight(8, 256, 128, False, torch.float16)])


@pytest.mark.parametrize(
    ("group", "columns", "expected"), [(16, 16, 128), (96, 192, 32), (64, 128, 64), (512, 1024, 128)]
)
def test_groups_are_cut_into_those_that_the_kernels_know(group, columns, expected):
    assert kernel_group_size(group, columns) == expected


def test_what_the_kernels_cannot_compute_is_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        to_kernel(weight(8, 96, 48, False, torch.float16), torch.float16)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        to_kernel(weight(8, 128, 128, False, torch.float16), torch.float32)
    endless = weight(8, 128, 128, False, torch.float16)
    endless.scales[3, 0] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        to_kernel(endless, torch.float16)
