"""W8A8 linears against exact integer products: in Triton's interpreter, or on the GPU that is there."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab_kernels import ref
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.w4a16 import programmatic
from quantlab_kernels.w8a8 import (
    choose_tile,
    prepare,
    quantize_tokens,
    run,
    supported_kernels,
    w8a8_gemm,
    w8a8_linear,
)
from quantlab_kernels.w8a8_layout import W8A8Weight, to_w8a8
from quantlab_kernels.w8a8_tiles import DotTile, OneTokenTile, Tile, WgmmaTile

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
Case = tuple[int, int, int, bool, Tile]  # tokens, N, K, bias, tile
PORTABLE: list[Case] = [
    (1, 64, 128, False, DotTile(16, 64)),
    (5, 100, 80, True, DotTile(16, 64)),
    (33, 130, 200, True, DotTile(32, 64)),
    (17, 7, 33, False, DotTile(16, 64)),
    (1, 64, 128, False, OneTokenTile(8, 16, 4)),
    (1, 77, 208, True, OneTokenTile(4, 32, 4)),
    (1, 3, 16, False, OneTokenTile(8, 1024, 4)),
]
HOPPER: list[Case] = [
    (1, 64, 128, False, WgmmaTile(4, 1, 8, 1, 1, 2)),
    (2, 57, 4096, True, WgmmaTile(4, 1, 8, 2, 8, 4)),
    (17, 333, 1040, True, WgmmaTile(4, 1, 32, 2, 3, 3)),
    (65, 1000, 4096, False, WgmmaTile(4, 1, 128, 1, 0, 2)),
    (129, 4096, 2048, True, WgmmaTile(4, 2, 128, 1, 0, 2)),
    (256, 512, 208, False, WgmmaTile(8, 2, 128, 1, 1, 1)),
    (300, 1000, 1024, True, WgmmaTile(8, 1, 256, 1, 0, 1)),
    (1100, 6144, 1024, False, WgmmaTile(4, 2, 128, 1, 0, 2)),  # several tiles a program
]


def draw(rows: int, columns: int) -> W8A8Weight:
    """A random weight whose products with quantized gaussians are of order one."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
    return W8A8Weight(codes, (torch.rand(rows, device=DEVICE) + 0.5) / 64 / columns**0.5)


def identity(case: Case) -> str:
    return f"M{case[0]}-N{case[1]}-K{case[2]}-{type(case[4]).__name__}"


def assert_right(case: Case, tile: Tile | None, dtype: torch.dtype) -> None:
    """The exact integer product, scaled; the same bits again and without overlap; nothing written past the end."""
    tokens, rows, columns, with_bias, _ = case
    weight = draw(rows, columns)
    codes, scales = ref.quantize_per_token(torch.randn(tokens, columns, device=DEVICE))
    bias = torch.randn(rows, device=DEVICE).to(dtype) if with_bias else None
    exact = ref.int8_matmul(codes, weight.codes).double() * scales.double() * weight.scales.double()
    exact += 0 if bias is None else bias.double()
    outs = []
    for early in (True, True, False) if programmatic(DEVICE) else (False, False):
        room = torch.full((exact.numel() + 1024,), math.nan, dtype=dtype, device=DEVICE)
        outs.append(room[: exact.numel()].view_as(exact))
        run(codes, scales.view(-1), weight, bias, outs[-1], tile, early)
        assert room[exact.numel() :].isnan().all()
    # The sums are exact: what is left is one rounding to the result's dtype.
    assert relative_rmse(outs[0], exact) < {torch.float16: 4.9e-4, torch.bfloat16: 2.4e-3, torch.float32: 1e-6}[dtype]
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """On a GPU, compile what the tests launch in parallel first."""
    if GPU and WgmmaTile in supported_kernels(DEVICE):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_case, HOPPER))


def compile_case(case: Case) -> None:
    tokens, rows, columns, with_bias, tile = case
    codes = torch.empty(tokens, columns, dtype=torch.int8, device=DEVICE)
    out = torch.empty(tokens, rows, dtype=torch.bfloat16, device=DEVICE)
    bias = out[0] if with_bias else None
    for early in (True, False):
        kernel, grid, arguments, options = prepare(codes, codes[:, :4].float()[:, 0].contiguous(), draw(rows, columns),
                                                   bias, out, tile, early)  # fmt: skip
        kernel.warmup(*arguments, grid=grid, **options)


@pytest.mark.parametrize("case", PORTABLE, ids=identity)
def test_portable_kernels_give_the_exact_product(case):
    assert_right(case, case[4], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER, ids=identity)
def test_the_gluon_kernel_gives_the_exact_product(case):
    if WgmmaTile not in supported_kernels(DEVICE):
        pytest.skip("not a Hopper GPU, or another Triton")
    assert_right(case, case[4], torch.bfloat16)


@pytest.mark.gpu
def test_the_chosen_tile_is_right_for_any_number_of_tokens():
    for tokens in (1, 2, 8, 15, 16, 17, 33, 64, 65, 129, 256, 257, 700):
        assert_right((tokens, 1000, 2816, True, DotTile(16, 64)), None, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantized_tokens_are_those_of_the_reference_to_the_bit(dtype):
    for tokens, columns in ((1, 7), (5, 200), (40, 4096), (2, 16385)):
        smallest = -36 if dtype == torch.float32 else -6
        x = torch.randn(tokens, columns, device=DEVICE) * torch.logspace(smallest, 3, tokens, device=DEVICE)[:, None]
        x[0, ::3] = 0
        codes, scales = quantize_tokens(x.to(dtype))
        # On the CPU: on a GPU torch divides by a number through its reciprocal, and the reference is an ulp off.
        wanted_codes, wanted_scales = ref.quantize_per_token(x.to(dtype).cpu())
        assert torch.equal(scales.cpu(), wanted_scales.view(-1)) and torch.equal(codes.cpu(), wanted_codes)


def test_the_remainder_corrects_the_quotient_to_what_division_gives():
    """The arithmetic of `quotient`, with float64 for the multiply-add that rounds once."""
    x = torch.randn(2_000_000, dtype=torch.float32)
    scale = (torch.rand(2_000_000) + 0.5) * 2.0 ** torch.randint(-30, -4, (2_000_000,))
    inverse = 1 / scale
    q = x * inverse
    remainder = (x.double() - q.double() * scale.double()).float()
    corrected = (remainder.double() * inverse.double() + q.double()).float()
    assert torch.equal(corrected, x / scale)
    assert not torch.equal(q, x / scale)


def test_ties_go_to_even_and_a_row_of_zeros_to_codes_of_zero():
    x = torch.zeros(2, 256, device=DEVICE)
    x[0] = torch.arange(-128, 128, device=DEVICE) + 0.5  # absmax 127.5, so that the scale is 1 and all are ties
    codes, scales = quantize_tokens(x)
    assert scales[0] == 1 and torch.equal(codes[0].float(), x[0].round().clamp(-128, 127))
    assert not codes[1].any() and scales[1] == torch.finfo(torch.float32).eps


def test_a_linear_keeps_the_leading_shape_and_matches_the_reference():
    codes = torch.randint(-128, 128, (100, 256), dtype=torch.int8, device=DEVICE)
    q = QuantizedWeight(codes, torch.rand(100, 1, device=DEVICE).half() / 1024, None, 256)
    x, bias = torch.randn(2, 3, 256, device=DEVICE).half(), torch.randn(100, device=DEVICE).half()
    y = w8a8_linear(x, to_w8a8(q), bias)
    assert y.shape == (2, 3, 100)
    on_cpu = QuantizedWeight(codes.cpu(), q.scales.cpu(), None, 256)
    assert relative_rmse(y.cpu(), ref.w8a8_linear(x.cpu(), on_cpu, bias.cpu())) < 1e-4


def test_no_tokens_give_no_rows():
    assert w8a8_linear(torch.empty(0, 256, device=DEVICE).half(), draw(100, 256)).shape == (0, 100)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda codes, scales: (codes.short(), scales), "int8"),
        (lambda codes, scales: (codes[:, :-1].contiguous(), scales), "codes must be"),
        (lambda codes, scales: (codes, scales.double()), "float32"),
        (lambda codes, scales: (codes, scales[:-1]), "scales must be"),
        (lambda codes, scales: (codes.t().contiguous().t(), scales), "contiguous"),
    ],
)
def test_wrong_tensors_are_refused_in_one_sentence(change, words):
    codes = torch.zeros(3, 64, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match=words):
        w8a8_gemm(*change(codes, torch.ones(3, device=DEVICE)), draw(16, 64))


def test_a_bias_of_another_dtype_and_an_impossible_result_are_refused():
    codes, scales = quantize_tokens(torch.randn(3, 64, device=DEVICE))
    with pytest.raises(ValueError, match="bias must be"):
        w8a8_gemm(codes, scales, draw(16, 64), torch.zeros(16, device=DEVICE))
    with pytest.raises(ValueError, match="the result can be"):
        w8a8_gemm(codes, scales, draw(16, 64), dtype=torch.int32)
    with pytest.raises(ValueError, match="floating"):
        quantize_tokens(codes)


def test_weights_with_zero_points_or_groups_or_broken_scales_are_refused():
    codes = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match="one scale a row"):
        to_w8a8(QuantizedWeight(codes, torch.ones(4, 2), None, 32))
    with pytest.raises(ValueError, match="symmetric"):
        to_w8a8(QuantizedWeight(codes, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int8), 64))
    with pytest.raises(ValueError, match="finite"):
        to_w8a8(QuantizedWeight(codes, torch.full((4, 1), math.inf), None, 64))


def test_one_token_takes_the_kernel_without_tensor_cores_and_odd_k_the_plain_one():
    one_token = OneTokenTile in supported_kernels(DEVICE)
    assert isinstance(choose_tile(draw(64, 128), 1), OneTokenTile if one_token else DotTile)
    assert isinstance(choose_tile(draw(64, 33), 1), DotTile)
