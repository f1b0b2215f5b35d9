"""y = x W^T (+ bias) on INT8 activations and weights: quantization token by token, checks, choice of a kernel, launch.

Which kernel runs where is `supported_kernels`: Gluon on Hopper under the Triton releases it was checked with, dot
products of four bytes for one token on NVIDIA GPUs, plain Triton everywhere else and in the interpreter. Knows nothing
about models.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantlab_kernels.gluon_schedule import program_count, streamed_tiles
from quantlab_kernels.rows import empty_rows, readable_rows
from quantlab_kernels.w4a16 import GLUON_RELEASES, INTERPRETED, processors, programmatic, workspace
from quantlab_kernels.w8a8_gluon import w8a8_gluon_kernel
from quantlab_kernels.w8a8_layout import W8A8Weight
from quantlab_kernels.w8a8_tiles import DotTile, OneTokenTile, Tile, WgmmaTile, likely_tile, measured_tile
from quantlab_kernels.w8a8_triton import quantize_tokens_kernel, w8a8_one_token_kernel, w8a8_plain_kernel

KERNELS = (quantize_tokens_kernel, w8a8_one_token_kernel, w8a8_plain_kernel, w8a8_gluon_kernel)
CACHE_KEYS = () if INTERPRETED else tuple(kernel.cache_key for kernel in KERNELS)  # see w4a16.CACHE_KEYS
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_COLUMNS = 8192  # of a token that a program keeps in registers
Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token of x [..., K] (fp16, bf16, fp32) to INT8: codes [M, K] int8 and scales [M] float32.

    To the bit what `ref.quantize_per_token` gives. Raises ValueError for another dtype or a device without kernels.
    """
    _check_device(x)
    if x.dim() == 0 or x.dtype not in DTYPES:
        raise ValueError(f"x must be a floating [..., K], not {list(x.shape)} {x.dtype}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    codes = empty_rows(rows.shape[0], rows.shape[1], torch.int8, x.device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if codes.numel():
        _launch(prepare_quantize(rows, codes, scales, programmatic(x.device)))
    return codes, scales


def w8a8_gemm(
    codes: Tensor, scales: Tensor, weight: W8A8Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """(codes W^T) * scales * weight.scales + bias: codes [M, K] int8, scales [M] float32, bias [N] or None in `dtype`.

    Returns [M, N] in `dtype` (fp16, bf16, fp32); integer sums are exact. Raises ValueError for a wrong dtype, shape or
    device. Calls at the same time on one stream's workspace (two graphs captured on one stream) are the caller's to
    avoid.
    """
    _check(codes, scales, weight, bias, dtype)
    out = empty_rows(codes.shape[0], weight.out_features, dtype, codes.device)
    run(codes, scales, weight, bias, out, None, programmatic(codes.device))
    return out


def w8a8_linear(x: Tensor, weight: W8A8Weight, bias: Tensor | None = None) -> Tensor:
    """A linear layer on x [..., K] (fp16, bf16, fp32), quantized here token by token. Returns [..., N] in x's dtype."""
    codes, scales = quantize_tokens(x)
    return w8a8_gemm(codes, scales, weight, bias, x.dtype).view(*x.shape[:-1], weight.out_features)


@cache
def supported_kernels(device: torch.device) -> tuple[type[Tile], ...]:
    """The kernels, by their tiles, that `device` runs."""
    if INTERPRETED:
        return DotTile, OneTokenTile
    if device.type != "cuda" or torch.version.hip:
        return (DotTile,)
    gluon = torch.cuda.get_device_capability(device) == (9, 0) and triton.__version__.startswith(GLUON_RELEASES)
    return (DotTile, OneTokenTile, WgmmaTile) if gluon else (DotTile, OneTokenTile)


def choose_tile(weight: W8A8Weight, tokens: int) -> Tile:
    """The tile measured on this GPU for that weight and number of tokens, else a likely one."""
    device, (rows, columns) = weight.codes.device, weight.codes.shape
    kernels = supported_kernels(device) if columns % 16 == 0 else (DotTile,)
    measured = (
        measured_tile(torch.cuda.get_device_name(device), rows, columns, tokens) if device.type == "cuda" else None
    )
    if measured is None or type(measured) not in kernels or (tokens > 1 and isinstance(measured, OneTokenTile)):
        return likely_tile(rows, columns, tokens, kernels, processors(device))
    return measured


def run(
    codes: Tensor, scales: Tensor, weight: W8A8Weight, bias: Tensor | None, out: Tensor, tile: Tile | None, early: bool
) -> None:
    """Enqueue out [M, N] with `tile`, or with the best one known; `early`: begin while the kernel before still runs."""
    if out.numel():
        _launch(prepare(codes, scales, weight, bias, out, tile or choose_tile(weight, codes.shape[0]), early))


def prepare_quantize(x: Tensor, codes: Tensor, scales: Tensor, early: bool) -> Launch:
    """The launch that quantizes x [M, K]: kernel, grid, arguments and options."""
    tokens, columns = x.shape
    size = min(MOST_COLUMNS, 1 << (columns - 1).bit_length())
    arguments = (x, codes, scales, tokens, columns, size, -(-columns // size), not INTERPRETED, early)
    warps = min(16, max(4, size // 512))
    return quantize_tokens_kernel, (tokens,), arguments, _options(warps, early)


def prepare(
    codes: Tensor, scales: Tensor, weight: W8A8Weight, bias: Tensor | None, out: Tensor, tile: Tile, early: bool
) -> Launch:
    """The launch of a product: kernel, grid, arguments and options. Raises ValueError for a tile that cannot run."""
    tokens, (rows, columns) = codes.shape[0], weight.codes.shape
    pointers = (scales, weight.codes, weight.scales, weight.scales if bias is None else bias, out)
    if isinstance(tile, WgmmaTile):
        return _prepare_gluon(codes, pointers, bias is not None, tile, early)
    if isinstance(tile, OneTokenTile):
        if tokens != 1 or columns % 16:
            raise ValueError(f"{tile} is for one token and K a multiple of 16, not {tokens} and {columns}")
        words = columns // 4
        operands = (codes.view(torch.int32), scales, weight.codes.view(torch.int32), *pointers[2:], rows, words)
        shape = (tile.rows, tile.words, -(-words // tile.words), bias is not None, not INTERPRETED, early)
        return w8a8_one_token_kernel, (-(-rows // tile.rows),), (*operands, *shape), _options(tile.warps, early)
    grid = (-(-tokens // tile.tokens) * -(-rows // tile.rows),)
    arguments = (codes, *pointers, tokens, rows, columns, tile.tokens, tile.rows, 64, bias is not None)
    return w8a8_plain_kernel, grid, arguments, {"num_warps": 4}


def _prepare_gluon(codes: Tensor, pointers: tuple[Tensor, ...], bias: bool, tile: WgmmaTile, early: bool) -> Launch:
    scales, weight, weight_scales, bias_or_any, out = pointers
    if codes.shape[1] % 16 or codes.data_ptr() % 16 or weight.data_ptr() % 16 or tile.stages < 2:
        raise ValueError(f"{tile} needs K a multiple of 16, rows that begin at multiples of 16 bytes, and two stages")
    row_tiles, token_tiles = -(-weight.shape[0] // tile.rows), -(-codes.shape[0] // tile.tokens)
    tiles, stages = row_tiles * token_tiles, -(-codes.shape[1] // (128 * tile.chunks))
    slots = processors(codes.device) * tile.resident
    streamed, programs = streamed_tiles(tiles, tile.split, slots), program_count(tiles, tile.split, slots, stages)
    if tile.split > stages or programs * streamed * stages >= 1 << 31:
        raise ValueError(f"{tile} makes too many programs for {tiles} tiles")
    rooms = programs * (1 if tile.split else 2) if streamed else 0
    partials, counters = workspace(codes.device, streamed, rooms * tile.rows * tile.tokens)
    operands = (
        _descriptor(codes, tile.tokens),
        _descriptor(weight, tile.rows),
        scales,
        weight_scales,
        bias_or_any,
        out,
    )
    sizes = (codes.shape[0], weight.shape[0], row_tiles, token_tiles, stages, streamed)
    shape = (tile.stages, tile.warps, tile.row_blocks, tile.chunks, tile.tokens, tile.split, bias, early)
    options = _options(tile.warps, early) | {"maxnreg": tile.registers}
    return w8a8_gluon_kernel, (programs,), (*operands, partials.view(torch.int32), counters, *sizes, *shape), options


def _launch(launch: Launch) -> None:
    kernel, grid, arguments, options = launch
    kernel[grid](*arguments, **options)


def _descriptor(rows: Tensor, count: int) -> TensorDescriptor:
    """Boxes of `count` rows by 128 columns, which is also how tiles are cut."""
    shape = [readable_rows(rows, count), rows.shape[1]]
    return TensorDescriptor(rows, shape, [rows.shape[1], 1], [count, 128], gl.NVMMASharedLayout(128, 8, 2))


def _options(warps: int, early: bool) -> dict[str, Any]:
    return {"num_warps": warps} | ({"launch_pdl": True} if early else {})


def _check(codes: Tensor, scales: Tensor, weight: W8A8Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
    _check_device(codes)
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] != weight.in_features:
        raise ValueError(f"codes must be [M, {weight.in_features}] int8, not {list(codes.shape)} {codes.dtype}")
    if scales.dtype != torch.float32 or scales.numel() != codes.shape[0]:
        raise ValueError(f"scales must be [{codes.shape[0]}] float32, not {list(scales.shape)} {scales.dtype}")
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise ValueError("codes and scales must be contiguous")
    if not codes.device == scales.device == weight.codes.device:
        raise ValueError(f"codes are on {codes.device}, scales on {scales.device}, the weight on {weight.codes.device}")
    if dtype not in DTYPES:
        raise ValueError(f"the result can be float16, bfloat16 or float32, not {dtype}")
    wanted = (weight.out_features,)
    if bias is not None and (bias.shape != wanted or bias.dtype != dtype or bias.device != codes.device):
        got = f"{list(bias.shape)} {bias.dtype} on {bias.device}"
        raise ValueError(f"bias must be {list(wanted)} {dtype} on {codes.device}, not {got}")


def _check_device(x: Tensor) -> None:
    if not x.is_cuda and not INTERPRETED:
        raise ValueError("the kernels need a GPU, or TRITON_INTERPRET=1 in the environment")
