"""W4A16 linears against float64 on the same codes: in Triton's interpreter, or on the GPU that is there."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from quantlab.bench.gpu_timing import relative_rmse
from quantlab_kernels import ref
from quantlab_kernels.rows import padded
from quantlab_kernels.w4a16 import choose_tile, launch, programmatic, supported_kernels, w4a16_linear
from quantlab_kernels.w4a16_compile import Product, compile_in_parallel
from quantlab_kernels.w4a16_layout import kernel_group_size, to_kernel
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile, Tile
from quantlab_kernels.w4a16_unpack import minus_half
from tests.kernels.w4a16_cases import TOLERANCE, Linear

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]
PORTABLE: list[tuple[Linear, Tile]] = [
    (Linear(64, 128, 128, 1), PlainTile(1, 16)),
    (Linear(100, 256, 64, 5, zeros=True, bias=True), PlainTile(2, 16)),
    (Linear(130, 200, 200, 33, bias=True), PlainTile(2, 32)),
    (Linear(7, 96, 32, 17, zeros=True), PlainTile(1, 16)),
    (Linear(64, 128, 128, 1), DecodeTile(4, 4, 8, 1)),
    (Linear(100, 256, 128, 8, bias=True), DecodeTile(2, 1, 8, 1)),
    (Linear(70, 768, 64, 5, zeros=True), DecodeTile(2, 2, 8, 3)),
    (Linear(40, 672, 32, 17, zeros=True, bias=True), DecodeTile(2, 2, 16, 2)),
    (Linear(33, 200, 200, 3), DecodeTile(4, 1, 8, 1)),
    (Linear(64, 128, 128, 1, bits=8), PlainTile(1, 16)),
    (Linear(130, 160, 160, 17, bias=True, bits=8), PlainTile(2, 32)),
    (Linear(100, 256, 32, 5, zeros=True, bits=8), PlainTile(2, 16)),
]
HOPPER: list[tuple[Linear, Tile]] = [
    (Linear(64, 128, 128, 1), GluonTile(4, 1, 8, 0, 2, 1, 2)),
    (Linear(57, 4096, 128, 2), GluonTile(4, 1, 8, 0, 4, 8, 5)),
    (Linear(100, 256, 128, 7, bias=True), GluonTile(4, 1, 8, 0, 4, 1, 4)),
    (Linear(333, 1024, 64, 16, zeros=True, bias=True), GluonTile(8, 1, 16, 0, 2, 3, 2)),
    (Linear(130, 384, 128, 15), GluonTile(8, 1, 16, 0, 4, 2, 1)),
    (Linear(333, 1056, 32, 33, zeros=True, bias=True), GluonTile(8, 2, 64, 0, 2, 1, 1)),
    (Linear(64, 512, 128, 47), GluonTile(16, 1, 32, 16, 2, 1, 1)),
    (Linear(4096, 4096, 64, 65, bias=True), GluonTile(4, 1, 64, 0, 4, 4, 2)),
    (Linear(512, 4096, 128, 96, zeros=True, bias=True), GluonTile(8, 1, 64, 32, 2, 4, 1)),
    (Linear(130, 192, 192, 129, zeros=True), GluonTile(8, 2, 128, 0, 2, 1, 1)),
    (Linear(1000, 8192, 32, 256, zeros=True, bias=True), GluonTile(8, 1, 256, 0, 2, 3, 1)),
    (Linear(4096, 4096, 128, 300), GluonTile(8, 2, 128, 0, 2, 2, 1)),
    (Linear(6144, 4096, 128, 1100), GluonTile(8, 2, 128, 0, 2, 1, 1)),  # several tiles a program
    (Linear(3000, 1024, 128, 2600), GluonTile(8, 1, 256, 0, 2, 1, 1)),  # two bands of tiles
    # Tiles shared evenly: fewer than processors, a few more, and many more with a last wave of some.
    (Linear(1000, 4096, 128, 129, bias=True), GluonTile(8, 1, 128, 32, 2, 0, 1)),
    (Linear(4096, 2048, 64, 257, zeros=True), GluonTile(8, 1, 128, 64, 2, 0, 1)),
    (Linear(6144, 4096, 128, 1100), GluonTile(8, 1, 256, 0, 2, 0, 1)),
    # Stages of half an iteration.
    (Linear(4096, 4096, 128, 272), GluonTile(8, 1, 256, 16, 2, 2, 1)),
    (Linear(6144, 2048, 128, 300, bias=True), GluonTile(8, 1, 256, 64, 2, 0, 1)),
    (Linear(1000, 1056, 32, 545, zeros=True, bias=True), GluonTile(8, 1, 256, 32, 2, 1, 1)),
    (Linear(1000, 1056, 32, 300, zeros=True, bits=8), GluonTile(8, 1, 256, 0, 2, 0, 1)),
    (Linear(3000, 1024, 128, 2600, bias=True), GluonTile(8, 2, 128, 0, 2, 0, 1)),
    (Linear(2000, 1056, 32, 200, zeros=True, bias=True), GluonTile(4, 1, 128, 0, 2, 0, 2)),
    (Linear(64, 128, 128, 1, bits=8), GluonTile(4, 1, 8, 0, 2, 1, 2)),
    (Linear(333, 1024, 64, 16, zeros=True, bias=True, bits=8), GluonTile(8, 1, 16, 0, 2, 3, 2)),
    (Linear(130, 384, 128, 33, bits=8), GluonTile(4, 1, 64, 0, 4, 2, 1)),
    (Linear(1000, 1056, 32, 65, zeros=True, bits=8), GluonTile(8, 1, 64, 32, 2, 0, 1)),
    (Linear(4096, 4096, 4096, 300, bias=True, bits=8), GluonTile(8, 2, 128, 0, 2, 0, 1)),
]
# A shape that nobody measured, and one that was: numbers of tokens within and at the edges of buckets.
CHOSEN = {(1000, 2816): (1, 2, 9, 17, 33, 65, 129, 193, 700), (6144, 4096): (1, 8, 17, 64, 97, 256, 257)}


def identity(case: tuple[Linear, Tile]) -> str:
    linear, tile = case
    return f"N{linear.rows}-K{linear.columns}-g{linear.group}-M{linear.tokens}-{linear.bits}bit-{type(tile).__name__}"


def assert_right(linear: Linear, tile: Tile | None) -> None:
    """Right, to the same bits again and without overlap, and nothing written past the end."""
    q, x, bias, exact = linear.draw(DEVICE.type)
    weight = to_kernel(q, linear.dtype, linear.bits)
    aligned = linear.columns % 8 == 0
    tile = tile or choose_tile(linear.rows, linear.columns, linear.tokens, DEVICE, aligned, linear.bits)
    outs = []
    for early in (True, True, False) if programmatic(DEVICE) else (False, False):
        room = torch.full((exact.numel() + 1024,), float("nan"), dtype=x.dtype, device=DEVICE)
        outs.append(room[: exact.numel()].view_as(exact))
        launch(x, weight, bias, outs[-1], tile, early)
        assert room[exact.numel() :].isnan().all()
    assert relative_rmse(outs[0], exact) < TOLERANCE[linear.dtype]
    assert all(torch.equal(outs[0], out) for out in outs)


def with_dtype(linear: Linear, dtype: torch.dtype) -> Linear:
    return replace(linear, dtype=dtype)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """On a GPU, compile what the tests launch in parallel first: one after the other it takes minutes."""
    if GPU:
        cases = [case for case in PORTABLE + HOPPER if type(case[1]) in supported_kernels(DEVICE)]
        products = [
            Product(
                c.rows,
                c.columns,
                c.tokens,
                tile,
                dtype,
                kernel_group_size(c.group, c.columns),
                c.zeros,
                c.bias,
                early,
                c.bits,
            )  # fmt: skip
            for (c, tile), dtype, early in product(cases, DTYPES, {programmatic(DEVICE), False})
        ]
        products += [
            Product(
                rows, columns, m, choose_tile(rows, columns, m, DEVICE), torch.bfloat16, bias=rows == 1000, early=early
            )
            for (rows, columns), counts in CHOSEN.items()
            for m, early in product(counts, {programmatic(DEVICE), False})
        ]
        major, minor = torch.cuda.get_device_capability()
        assert not compile_in_parallel(products, 10 * major + minor, os.cpu_count() or 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PORTABLE, ids=identity)
def test_portable_kernels_match_float64(case, dtype):
    assert_right(with_dtype(case[0], dtype), case[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", HOPPER, ids=identity)
def test_the_gluon_kernel_matches_float64(case, dtype):
    if GluonTile not in supported_kernels(DEVICE):
        pytest.skip("not a Hopper GPU, or another Triton")
    assert_right(with_dtype(case[0], dtype), case[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_the_chosen_tile_is_right_for_any_number_of_tokens(shape):
    for tokens in CHOSEN[shape]:
        assert_right(Linear(*shape, 128, tokens, bias=shape[0] == 1000, dtype=torch.bfloat16), None)


def test_a_linear_keeps_the_leading_shape_and_matches_the_reference():
    q, x, bias, _ = Linear(100, 256, 128, 6, zeros=True, bias=True).draw(DEVICE.type)
    y = w4a16_linear(x.view(2, 3, 256), to_kernel(q, x.dtype), bias)
    assert y.shape == (2, 3, 100)
    assert relative_rmse(y, ref.w4a16_linear(x.view(2, 3, 256), q, bias)) < TOLERANCE[x.dtype]


@triton.jit
def minus_half_kernel(scales, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, minus_half(tl.load(scales + at), 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_eight_scales_are_exact_or_rounded_to_nothing(dtype):
    bits = torch.arange(-32768, 32768, dtype=torch.int16)
    scales = bits.view(dtype)[torch.isfinite(bits.view(dtype))]
    scales = torch.cat((scales, torch.zeros(65536 - scales.numel(), dtype=dtype))).to(DEVICE)
    out = torch.full_like(scales, float("nan"))
    minus_half_kernel[(1,)](scales, out, 65536, enable_fp_fusion=True)
    exact = scales.double() * -(2.0 ** (-130 if dtype == torch.bfloat16 else -21))
    smallest = torch.finfo(dtype).smallest_normal
    assert torch.equal(out.double()[exact.abs() >= smallest], exact[exact.abs() >= smallest])
    assert (out.double() - exact).abs().max() <= smallest


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 129])
def test_rows_behind_the_last_are_read_and_reach_nothing(tokens):
    q, x, _, exact = Linear(333, 1024, 128, tokens, dtype=torch.bfloat16).draw(DEVICE.type)
    room = torch.full((padded(tokens), 1024), float("nan"), dtype=x.dtype, device=DEVICE)
    room[:tokens] = x
    y = w4a16_linear(room[:tokens], to_kernel(q, x.dtype))
    assert torch.equal(y, w4a16_linear(x, to_kernel(q, x.dtype)))
    assert relative_rmse(y, exact) < TOLERANCE[x.dtype]


def test_no_tokens_give_no_rows():
    q, x, _, _ = Linear(100, 256, 128, 6).draw(DEVICE.type)
    assert w4a16_linear(x[:0], to_kernel(q, x.dtype)).shape == (0, 100)


def test_a_view_of_x_with_gaps_is_taken_as_what_it_says():
    q, x, _, exact = Linear(64, 256, 128, 6).draw(DEVICE.type)
    gaps = torch.full((6, 300), float("nan"), dtype=x.dtype, device=DEVICE)
    gaps[:, 7:263] = x
    assert relative_rmse(w4a16_linear(gaps[:, 7:263], to_kernel(q, x.dtype)), exact) < TOLERANCE[x.dtype]


def test_one_stream_of_calls_leaves_the_counters_as_they_were():
    q, x, _, exact = Linear(64, 1024, 128, 3).draw(DEVICE.type)
    weight = to_kernel(q, x.dtype)
    for split in (4, 2, 3):
        assert relative_rmse(w4a16_linear(x, weight, tile=DecodeTile(1, 4, 8, split)), exact) < TOLERANCE[x.dtype]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, bias: (x[:, :128], bias), "x must be"),
        (lambda x, bias: (x.float(), bias), "prepared for"),
        (lambda x, bias: (x, bias[:-1]), "bias must be"),
        (lambda x, bias: (x, bias.float()), "bias must be"),
        (lambda x, bias: (x.to("meta"), bias), "is on meta"),
    ],
    ids=["shape", "dtype", "bias shape", "bias dtype", "device"],
)
def test_wrong_operands_are_refused_in_a_sentence(change, message):
    q, x, bias, _ = Linear(64, 256, 128, 2, bias=True).draw(DEVICE.type)
    x, bias = change(x, bias)
    with pytest.raises(ValueError, match=message):
        w4a16_linear(x, to_kernel(q, torch.float16), bias)


def test_a_tile_that_cannot_run_here_is_refused():
    q, x, _, _ = Linear(64, 128, 128, 2).draw(DEVICE.type)
    with pytest.raises(ValueError, match="does not"):
        w4a16_linear(x, to_kernel(q, x.dtype), tile=GluonTile(4, 1, 8, 0, 2, 8, 1))
