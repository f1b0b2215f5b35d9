"""Quantized linears on the CPU mean what quantlab_kernels.ref says, and say which kernel they are."""

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.runtime.linears import DenseLinear, RawLinear, SideBySide, fuse
from quantlab.runtime.linears_cpu import WIDEN_TOKENS, Int4Linear, Int8Linear, W8A8Linear, even_rows, make_linear
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize, w8a8_linear

# Rounding of activations, scales and outputs to bf16; 0.0014 to 0.0030 measured.
BF16_ERROR = 0.005


def random_linear(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> RawLinear:
    """Codes over the scheme's whole range, scales and bias such that outputs are of order one."""
    group = scheme.group_size or columns
    shape = (rows, columns // group)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(shape) + 0.5) / (scheme.code_max * columns**0.5)
    zeros = None if scheme.symmetric else torch.randint(scheme.code_min, scheme.code_max + 1, shape, dtype=torch.int8)
    q = QuantizedWeight(codes, scales.to(dtype), zeros, group)
    return RawLinear(q, scheme, torch.randn(rows).to(dtype) if bias else None)


def expected(raw: RawLinear, x: torch.Tensor) -> torch.Tensor:
    """In fp32, from the stored codes and scales."""
    assert isinstance(raw.weight, QuantizedWeight)
    q = QuantizedWeight(raw.weight.codes, raw.weight.scales.float(), raw.weight.zeros, raw.weight.group_size)
    y = x.float() @ dequantize(q).t()
    return y if raw.bias is None else y + raw.bias.float()


@pytest.mark.parametrize("tokens", [1, 5, WIDEN_TOKENS + 3])
@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "kind"),
    [
        (Scheme("w4a16", 128), 96, 256, Int4Linear),
        (Scheme("w4a16", 64), 64, 192, Int4Linear),
        (Scheme("w4a16", 32, symmetric=False), 100, 256, Int4Linear),  # rows that fill no whole tile
        (Scheme("w4a16", None), 40, 192, Int4Linear),
        (Scheme("w8a16", None), 50, 160, Int8Linear),
        (Scheme("w4a16", None, symmetric=False), 33, 100, DenseLinear),  # 100 columns: no group size fits
        (Scheme("w8a16", 64), 48, 128, DenseLinear),
        (Scheme("w8a16", None, symmetric=False), 48, 128, DenseLinear),
    ],
)
def test_weight_only_products_match_the_stored_weight(
    scheme: Scheme, rows: int, columns: int, kind: type, tokens: int
) -> None:
    raw = random_linear(scheme, rows, columns, torch.bfloat16)
    layer = make_linear(raw)
    x = torch.randn(tokens, columns).to(torch.bfloat16)
    assert isinstance(layer, kind)
    assert ("no kernel" in layer.kernel) == (kind is DenseLinear)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_rmse(y, expected(raw, x)) < BF16_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_w8a8_is_exact_to_the_last_bit(dtype: torch.dtype, tokens: int) -> None:
    raw = random_linear(Scheme("w8a8", None), 50, 1100, dtype)
    assert isinstance(raw.weight, QuantizedWeight)
    raw.weight.codes[0] = 127  # the greatest sums that can be: a product that saturates on the way differs
    raw.weight.codes[1] = -128
    x = torch.randn(tokens, 1100).to(dtype)
    x[0] = 2.0
    layer = make_linear(raw)
    assert isinstance(layer, W8A8Linear)
    assert torch.equal(layer(x), w8a8_linear(x, raw.weight, raw.bias))


def test_int4_runs_packed_whatever_the_dtype_of_activations() -> None:
    raw = random_linear(Scheme("w4a16", 128), 64, 256, torch.float32)
    layer, x = make_linear(raw), torch.randn(3, 256)
    assert isinstance(layer, Int4Linear) and layer(x).dtype == torch.float32
    assert layer.nbytes == 64 * 256 // 2 + 64 * 2 * 2 * 2 + 64 * 4  # codes, scales, bias
    assert relative_rmse(layer(x), expected(raw, x)) < BF16_ERROR


@pytest.mark.parametrize("scheme", [None, Scheme("w4a16", 32, symmetric=False), Scheme("w8a8", None)])
def test_fused_rows_are_the_parts_one_after_the_other(scheme: Scheme | None) -> None:
    if scheme is None:
        parts = [RawLinear(torch.randn(n, 64), None, torch.randn(n)) for n in (32, 16, 16)]
    else:
        parts = [random_linear(scheme, n, 64, torch.float32) for n in (32, 16, 16)]
    x = torch.randn(4, 64)
    fused = fuse(parts, make_linear)
    assert not isinstance(fused, SideBySide)
    torch.testing.assert_close(fused(x), torch.cat([make_linear(part)(x) for part in parts], 1), rtol=1e-5, atol=1e-5)


def test_parts_of_different_schemes_run_side_by_side() -> None:
    parts = [
        random_linear(Scheme("w4a16", 32), 16, 64, torch.bfloat16),
        random_linear(Scheme("w8a8", None), 16, 64, torch.bfloat16),
        RawLinear(torch.randn(8, 64).bfloat16(), None, None),
    ]
    x = torch.randn(4, 64).bfloat16()
    fused = fuse(parts, make_linear)
    assert isinstance(fused, SideBySide)
    assert all(make_linear(part).kernel in fused.kernel for part in parts)
    assert torch.equal(fused(x), torch.cat([make_linear(part)(x) for part in parts], 1))


def test_products_meet_few_different_numbers_of_rows() -> None:
    counts = {even_rows(torch.ones(rows, 4)).shape[0] for rows in range(1, 513)}
    assert len(counts) <= 40
    x = torch.randn(33, 4)
    even = even_rows(x)
    assert even.shape == (40, 4) and torch.equal(even[:33], x) and not even[33:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_a_dense_layer_is_torchs_own(dtype: torch.dtype, tokens: int) -> None:
    weight, bias = torch.randn(24, 32).to(dtype), torch.randn(24).to(dtype)
    x = torch.randn(tokens, 32).to(dtype)
    y = make_linear(RawLinear(weight, None, bias))(x)
    assert y.shape == (tokens, 24) and torch.allclose(
        y, torch.nn.functional.linear(x, weight, bias), atol=1e-5, rtol=8e-3
    )
