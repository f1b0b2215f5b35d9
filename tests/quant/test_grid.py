"""Scales, zero points and nearest codes, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.quant.grid import absmax_params, decode, grouped, levels, nearest_codes, searched_params, spread_groups
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize

SCHEMES = [
    Scheme("w4a16", 32),
    Scheme("w4a16", None),
    Scheme("w4a16", 32, symmetric=False),
    Scheme("w4a16", None, symmetric=False),
    Scheme("w8a16", 64),
    Scheme("w8a8", None),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def error(w: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    return decode(nearest_codes(w, scales, zeros, scheme), scales, zeros) - w


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_absmax_errs_by_at_most_half_a_step_and_the_scales_own_rounding(scheme: Scheme, dtype: torch.dtype) -> None:
    w = torch.randn(8, 128) * torch.logspace(-3, 2, 8)[:, None]
    scales, zeros = absmax_params(w, scheme, dtype)
    assert scales.dtype == dtype and scales.shape == (8, scheme.groups(128))
    slack = 1 + 2 * (1 << scheme.bits) * torch.finfo(dtype).eps  # the extreme code times the scale's rounding
    half = 0.5 if scheme.symmetric else 1.0  # a zero point rounds the span's end by up to half a step more
    limit = spread_groups(scales, 128).abs() * half * slack
    assert (error(w, scales, zeros, scheme).abs() <= limit).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_chosen_with_the_scale_that_is_stored(scheme: Scheme) -> None:
    """No neighbouring code decodes closer with the stored scale: codes from an unrounded scale would fail this."""
    w = torch.randn(16, 128)
    for scales, zeros in (absmax_params(w, scheme, torch.bfloat16), searched_params(w, None, scheme, torch.bfloat16)):
        codes = nearest_codes(w, scales, zeros, scheme)
        chosen = (decode(codes, scales, zeros) - w).abs()
        for step in (-1, 1):
            other = (codes.int() + step).clamp(scheme.code_min, scheme.code_max).to(torch.int8)
            assert (chosen <= (decode(other, scales, zeros) - w).abs() + 1e-6).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_search_never_does_worse_than_its_widest_span(scheme: Scheme, dtype: torch.dtype) -> None:
    w, importance = torch.randn(8, 128) ** 3, torch.rand(128) * 10
    found = searched_params(w, importance, scheme, dtype)
    plain = absmax_params(w, scheme, dtype)
    searched, absmax = ((error(w, *params, scheme).square() * importance).sum() for params in (found, plain))
    assert searched < absmax
    assert found[0].dtype == dtype


def test_the_search_heeds_the_importance_of_columns() -> None:
    """One column that matters: its own error shrinks below what an unweighted search leaves it."""
    scheme, w = Scheme("w4a16", 32), torch.randn(64, 32)
    importance = torch.full((32,), 1e-3)
    importance[7] = 1.0
    weighted = error(w, *searched_params(w, importance, scheme, torch.float32), scheme)
    unweighted = error(w, *searched_params(w, None, scheme, torch.float32), scheme)
    assert weighted[:, 7].square().sum() < 0.2 * unweighted[:, 7].square().sum()


def test_a_negative_scale_gives_the_larger_positive_side_the_extra_code() -> None:
    scheme = Scheme("w4a16", None)
    w = torch.tensor([[8.0, -7.0, 1.0, 0.0], [7.0, -8.0, 1.0, 0.0]])
    scales, zeros = searched_params(w, None, scheme, torch.float32)
    assert zeros is None
    assert (scales[0] < 0).all() and (scales[1] > 0).all()
    codes = nearest_codes(w, scales, None, scheme)
    assert codes[0, 0] == -8 and codes[1, 1] == -8
    assert torch.allclose(decode(codes, scales, None), w, rtol=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_group_of_zeros_decodes_to_zeros_with_a_scale_that_readers_accept(scheme: Scheme) -> None:
    w = torch.randn(4, 128)
    w[1] = 0.0
    for scales, zeros in (absmax_params(w, scheme, torch.float16), searched_params(w, None, scheme, torch.float16)):
        assert (scales != 0).all() and torch.isfinite(scales).all()
        codes = nearest_codes(w, scales, zeros, scheme)
        assert (decode(codes, scales, zeros)[1] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_too_small_for_the_stored_dtype_become_zero_not_nan(symmetric: bool) -> None:
    scheme, w = Scheme("w4a16", 32, symmetric), torch.full((2, 64), 1e-9)
    for scales, zeros in (absmax_params(w, scheme, torch.float16), searched_params(w, None, scheme, torch.float16)):
        assert (scales != 0).all()
        assert torch.isfinite(decode(nearest_codes(w, scales, zeros, scheme), scales, zeros)).all()


def test_an_asymmetric_span_always_holds_zero_exactly() -> None:
    scheme = Scheme("w4a16", 32, symmetric=False)
    for w in (torch.rand(4, 32) + 5.0, -torch.rand(4, 32) - 5.0, torch.randn(4, 32)):
        scales, zeros = absmax_params(w, scheme, torch.float32)
        assert zeros is not None and zeros.dtype == torch.int8
        assert scheme.code_min <= zeros.min() and zeros.max() <= scheme.code_max
        assert (decode(zeros.repeat_interleave(32, 1), scales, zeros) == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_decoding_says_what_the_reader_of_the_file_computes(scheme: Scheme) -> None:
    w = torch.randn(8, 128)
    scales, zeros = searched_params(w, None, scheme, torch.float32)
    codes = nearest_codes(w, scales, zeros, scheme)
    read = dequantize(QuantizedWeight(codes, scales, zeros, scheme.group_size or 128))
    assert torch.equal(decode(codes, scales, zeros), read)


def test_the_chunks_of_rows_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance, scheme = torch.randn(40, 64), torch.rand(64), Scheme("w4a16", 32, symmetric=False)
    whole = searched_params(w, importance, scheme, torch.bfloat16)
    monkeypatch.setattr("quantlab.quant.grid.CHUNK_ELEMENTS", 64 * 7)
    parts = searched_params(w, importance, scheme, torch.bfloat16)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), size=st.floats(1e-4, 1e4), scheme=st.sampled_from(SCHEMES))
def test_codes_stay_in_range_and_scale_with_the_weights(seed: int, size: float, scheme: Scheme) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * size
    scales, zeros = searched_params(w, None, scheme, torch.float32)
    codes = nearest_codes(w, scales, zeros, scheme)
    assert scheme.code_min <= codes.min() and codes.max() <= scheme.code_max
    assert error(w, scales, zeros, scheme).square().sum() <= 0.05 * w.square().sum()


def test_groups_are_runs_of_neighbouring_columns() -> None:
    w = torch.arange(128.0).view(1, 128)
    assert torch.equal(grouped(w, Scheme("w4a16", 32))[0, 1], torch.arange(32.0, 64.0))
    assert grouped(w, Scheme("w4a16", None)).shape == (1, 1, 128)
    zeros = torch.tensor([[1, 2]], dtype=torch.int8)
    codes = torch.ones(1, 4, dtype=torch.int8)
    assert levels(codes, zeros).tolist() == [[0, 0, -1, -1]]


def test_weights_behind_inputs_never_seen_are_not_clipped() -> None:
    w = torch.randn(8, 256)
    importance = torch.cat([torch.zeros(128), torch.ones(128)])
    scheme = Scheme("w4a16", 128)
    seen, _ = searched_params(w, importance, scheme, torch.bfloat16)
    plain, _ = searched_params(w, None, scheme, torch.bfloat16)
    assert torch.equal(seen, plain)
    none, _ = searched_params(w, torch.zeros(256), scheme, torch.bfloat16)
    assert torch.equal(none, plain)
