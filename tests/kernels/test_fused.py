"""The fused kernels against the modules that they replace; fp16 in the interpreter, bf16 too on a GPU."""

import pytest
import torch
from torch import Tensor

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.models.layers import RMSNorm
from quantlab_kernels import fused, ref_fused

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Relative RMSE against the same roundings in torch: an ulp here and there.
TOLERANCE = {torch.float16: 2e-4, torch.bfloat16: 1e-3}
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_codes_agree(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Equal scales and codes, but where a value is an ulp away and changes side."""
    (codes, scales), (exact, exact_scales) = found, wanted
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32
    assert codes.shape == exact.shape and scales.shape == exact_scales.shape
    assert torch.allclose(scales, exact_scales.to(scales.device), rtol=1e-2)
    away = (codes.int() - exact.int().to(codes.device)).abs()
    assert away.max() <= 1 and away.float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (3, 100), (17, 4096), (2, 5000)])
def test_norm_is_that_of_the_model_after_the_sum(rows: int, columns: int, dtype: torch.dtype):
    x, residual, weight = random(rows, columns, dtype=dtype), random(rows, columns, dtype=dtype), random(columns)
    module = RMSNorm(columns, EPS).to(DEVICE, dtype)
    module.weight.data.copy_(weight)
    normed, summed = fused.rms_norm(x, module.weight.data, EPS, residual)
    assert torch.equal(summed, x + residual)
    assert relative_rmse(normed, module(x + residual).detach()) < TOLERANCE[dtype]
    again, _ = fused.rms_norm(x, module.weight.data, EPS, residual)
    assert torch.equal(normed, again)


def test_norm_without_residual_gives_the_input_back():
    x, weight = random(4, 256), random(256)
    normed, summed = fused.rms_norm(x, weight, EPS)
    assert summed is x
    assert relative_rmse(normed, ref_fused.rms_norm(x, weight, EPS)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_of_chosen_rows_is_the_norm_of_these_rows(with_residual: bool):
    x, weight = random(9, 128), random(128)
    residual = random(9, 128) if with_residual else None
    rows = torch.tensor([8, 0, 3, 3], device=DEVICE)
    for found, wanted in zip(
        fused.rms_norm(x, weight, EPS, residual, rows), ref_fused.rms_norm(x, weight, EPS, residual, rows), strict=True
    ):
        assert found.shape == (4, 128)
        assert relative_rmse(found, wanted) < TOLERANCE[torch.float16]


def test_rows_of_a_wider_matrix_are_read_where_they_lie():
    wide, weight = random(5, 300), random(100)
    x, residual = wide[:, 100:200], wide[:, 200:]
    normed, summed = fused.rms_norm(x, weight, EPS, residual)
    assert torch.equal(summed, x + residual)
    assert relative_rmse(normed, ref_fused.rms_norm(x, weight, EPS, residual)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (5, 4096)])
def test_quantized_norm_is_the_quantization_of_the_norm(rows: int, columns: int, dtype: torch.dtype):
    x, residual = random(rows, columns, dtype=dtype), random(rows, columns, dtype=dtype)
    weight = random(columns, dtype=dtype)
    x[0], residual[0] = 0, 0  # a row of zeros has the smallest scale, and codes 0
    codes, scales, summed = fused.rms_norm_quantized(x, weight, EPS, residual)
    exact, exact_scales, exact_sum = ref_fused.rms_norm_quantized(x.cpu(), weight.cpu(), EPS, residual.cpu())
    assert torch.equal(summed.cpu(), exact_sum)
    assert not codes[0].any() and scales[0].item() == torch.finfo(torch.float32).eps
    assert_codes_agree((codes, scales), (exact, exact_scales))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 1500), (2, 14336), (16, 1024)])
def test_silu_times_gate(rows: int, columns: int, dtype: torch.dtype):
    gate_up = random(rows, 2 * columns, dtype=dtype) * 4
    out = fused.silu_mul(gate_up)
    assert out.shape == (rows, columns)
    assert relative_rmse(out, ref_fused.silu_mul(gate_up)) < TOLERANCE[dtype]
    wanted = ref_fused.silu_mul_quantized(gate_up.cpu())
    assert_codes_agree(fused.silu_mul_quantized(gate_up), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_any_size_are_closed_or_open(dtype: torch.dtype):
    largest = 60000.0 if GPU else 88.0  # the interpreter warns of an exponential that overflows
    gate = torch.tensor([[-largest, -88.0, -80.0, -20.0, -0.0, 20.0, 88.0, largest]], device=DEVICE, dtype=dtype)
    out = fused.silu_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    torch.testing.assert_close(out, ref_fused.silu_mul(torch.cat([gate, torch.ones_like(gate)], 1)))


def test_quantization_rounds_halves_to_even_as_the_reference_does():
    # gate 40 gives silu(gate) = 40 exactly, so that the products are the values to quantize: scale 2 / 127.5 * 127.5.
    up = torch.tensor([[127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -127.5, 3.0]], device=DEVICE).half()
    gate = torch.full_like(up, 32.0)
    codes, scales = fused.silu_mul_quantized(torch.cat([gate, up], 1))
    exact, exact_scales = ref_fused.silu_mul_quantized(torch.cat([gate, up], 1).cpu())
    assert torch.equal(codes.cpu(), exact) and torch.equal(scales.cpu(), exact_scales)
    assert codes[0, 1:6].tolist() == [0, 2, 2, 0, -2]


def test_an_embedding_follows_ids_and_tokens_not_read_back_yet():
    table = random(50, 1100)
    sampled = torch.tensor([7, 49, 0], device=DEVICE)
    ids = torch.tensor([3, -1, 49, -2, -3, 0], device=DEVICE)
    wanted = table[torch.tensor([3, 7, 49, 49, 0, 0], device=DEVICE)]
    assert torch.equal(fused.embed(ids, table, sampled), wanted)
    assert torch.equal(ref_fused.embed(ids, table, sampled), wanted)
    assert torch.equal(fused.embed(ids.abs(), table), table[ids.abs()])


def test_no_tokens_need_no_launch():
    nothing, weight = random(0, 64), random(64)
    assert fused.rms_norm(nothing, weight, EPS, nothing)[0].shape == (0, 64)
    assert fused.silu_mul(nothing).shape == (0, 32)
    assert fused.silu_mul_quantized(nothing)[1].shape == (0,)
    assert fused.embed(torch.zeros(0, dtype=torch.int64, device=DEVICE), random(3, 8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, w: fused.rms_norm(x.float(), w, EPS), "x is torch.float32"),
        (lambda x, w: fused.rms_norm(x, w[:-1], EPS), r"weight must be contiguous \[64\]"),
        (lambda x, w: fused.rms_norm(x, w, EPS, x[:1]), "residual must be"),
        (lambda x, w: fused.rms_norm(x.t(), w, EPS), "rows of x must be contiguous"),
        (lambda x, w: fused.rms_norm(x, w, EPS, rows=torch.zeros(1, dtype=torch.int32)), "rows must be contiguous"),
        (lambda x, w: fused.silu_mul(x[:, :63]), r"gate_up must be \[M, 2I\]"),
        (lambda x, w: fused.silu_mul(x[:, ::2]), "gate_up must be contiguous"),
        (lambda x, w: fused.embed(torch.zeros(2, dtype=torch.int32), x), "ids must be contiguous"),
        (lambda x, w: fused.embed(torch.zeros(2, dtype=torch.int64), x.double()), "the table must be"),
    ],
)
def test_what_the_kernels_cannot_read_is_refused_in_one_sentence(call, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        call(random(2, 64), random(64))
