"""The reference operations against the definitions they implement, written out in float64."""

import pytest
import torch

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize, int8_matmul, quantize_per_token, w8a8_linear


def weight(rows: int, columns: int, size: int, zeros: bool = False, dtype: torch.dtype = torch.float32):
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, columns // size) + 0.5).to(dtype)
    return QuantizedWeight(codes, scales, torch.randint(-8, 8, scales.shape, dtype=torch.int8) if zeros else None, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(64, 16), (64, 64), (96, 32)])
def test_dequantize_is_code_minus_zero_times_scale_in_the_scale_dtype(columns, size, zeros, dtype):
    q = weight(5, columns, size, zeros, dtype)
    offset = q.zeros.repeat_interleave(size, 1) if zeros else 0
    exact = (q.codes.double() - offset) * q.scales.double().repeat_interleave(size, 1)
    assert dequantize(q).dtype == dtype
    assert torch.equal(dequantize(q), exact.to(dtype))


def test_dequantize_leaves_its_operands_alone():
    q = weight(4, 32, 16, zeros=True)
    before = (q.codes.clone(), q.scales.clone(), q.zeros.clone())
    dequantize(q)
    assert all(torch.equal(a, b) for a, b in zip(before, (q.codes, q.scales, q.zeros), strict=True))


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 64), (128, 33)])
def test_each_token_gets_its_own_scale(shape):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    codes, scales = quantize_per_token(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scales.shape == (*shape[:-1], 1)
    assert torch.allclose(scales, x.abs().amax(-1, keepdim=True) / 127.5)
    # The largest value is half a step beyond code 127, hence the small slack on "half a step".
    assert ((codes * scales - x).abs() <= scales * (0.5 + 1e-4)).all()


def test_a_token_of_zeros_becomes_codes_of_zero():
    codes, scales = quantize_per_token(torch.zeros(2, 8))
    assert (codes == 0).all() and (scales > 0).all() and torch.isfinite(scales).all()


def test_tokens_are_quantized_as_compressed_tensors_does():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    x = torch.randn(2, 20, 96) * torch.logspace(-4, 4, 40).view(2, 20, 1)
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(96, 4))
    codes, scales = quantize_per_token(x)
    assert torch.equal(scales, scale)
    assert torch.equal(codes * scales, forward.fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("columns", [1, 100, 1024, 1025, 5000])
def test_integer_products_are_exact_even_when_every_sum_is_the_largest(columns):
    extreme = torch.full((3, columns), -128, dtype=torch.int8)
    mixed = torch.randint(-128, 128, (4, columns), dtype=torch.int8)
    both = torch.cat((extreme, mixed))
    assert torch.equal(int8_matmul(both, both), both.int() @ both.int().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_w8a8_linear_is_the_product_of_the_two_quantized_operands(dtype, bias):
    x = torch.randn(2, 9, 1500, dtype=dtype) / 1500**0.5
    codes = torch.randint(-128, 128, (17, 1500), dtype=torch.int8)
    q = QuantizedWeight(codes, torch.rand(17, 1) / 64, None, 1500)
    b = torch.randn(17, dtype=dtype) if bias else None
    tokens, scales = quantize_per_token(x)
    exact = (tokens.double() * scales.double()) @ (codes.double() * q.scales.double()).t()
    exact += b.double() if bias else 0
    y = w8a8_linear(x, q, b)
    assert y.dtype == dtype and y.shape == (2, 9, 17)
    error = ((y.double() - exact).norm() / exact.norm()).item()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
