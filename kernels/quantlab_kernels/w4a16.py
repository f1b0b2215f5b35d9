"""y = x W^T (+ bias) for a weight of 4-bit or 8-bit codes: checks, the choice of a kernel, the launch.

Which kernel runs where is `supported_kernels`: Gluon on Hopper under the Triton releases it was checked with, mma.sync
on NVIDIA GPUs from sm_80, plain Triton everywhere else and in the interpreter. Knows nothing about models.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantlab_kernels.gluon_schedule import program_count, streamed_tiles
from quantlab_kernels.rows import empty_rows, readable_rows
from quantlab_kernels.w4a16_decode import w4a16_decode_kernel
from quantlab_kernels.w4a16_gluon import w4a16_gluon_kernel
from quantlab_kernels.w4a16_heuristic import likely_tile
from quantlab_kernels.w4a16_layout import COLUMNS, ROWS, W4A16Weight
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile, Tile, measured_tile
from quantlab_kernels.w4a16_triton import w4a16_plain_kernel

# Gluon changes between releases; its kernel runs on a GPU under 3.6 and is compiled and linted under the others.
GLUON_RELEASES = ("3.6", "3.9")
COUNTERS = 1 << 16
INTERPRETED = triton.knobs.runtime.interpret
# Triton's hash of a kernel depends on which kernel was hashed first in a process, since they share functions. All are
# hashed here, in one order, so that a process finds in the cache what another one has compiled.
KERNELS = (w4a16_plain_kernel, w4a16_decode_kernel, w4a16_gluon_kernel)
CACHE_KEYS = () if INTERPRETED else tuple(kernel.cache_key for kernel in KERNELS)
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def w4a16_linear(x: Tensor, weight: W4A16Weight, bias: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """x W^T + bias, in float32 but for the operands: x: [..., K] and bias: [N] or None in the weight's dtype.

    Returns [..., N]. The same input gives the same bits. `tile` overrules the measured choice. Calls that run at the
    same time on one stream's workspace (two graphs captured on one stream, replayed on two) are the caller's to avoid.
    Raises ValueError for a wrong dtype, shape or device, and for a tile that this machine or shape cannot run.
    """
    _check(x, weight, bias)
    rows = x.reshape(-1, weight.in_features).contiguous()
    out = empty_rows(rows.shape[0], weight.out_features, x.dtype, x.device)
    run(rows, weight, bias, out, tile, early=programmatic(x.device))
    return out.view(*x.shape[:-1], weight.out_features)


def choose_tile(
    rows: int, columns: int, tokens: int, device: torch.device, aligned: bool = True, bits: int = 4
) -> Tile:
    """The tile measured on this GPU for a weight [rows, columns] of `bits`-bit codes, else a likely one.

    aligned: whether each row of x begins at a multiple of 16 bytes, as the copy engine that Gluon uses demands.
    """
    refused = ((GluonTile,) if not aligned else ()) + ((DecodeTile,) if bits == 8 else ())
    kernels = tuple(kind for kind in supported_kernels(device) if kind not in refused)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" and bits == 4 else None
    tile = measured_tile(gpu, rows, columns, tokens) if gpu else None
    if tile is None or type(tile) not in kernels:
        return likely_tile(rows, columns, tokens, kernels, processors(device), bits)
    return tile


@cache
def supported_kernels(device: torch.device) -> tuple[type[Tile], ...]:
    """The kernels, by their tiles, that `device` runs."""
    if INTERPRETED:
        return PlainTile, DecodeTile
    if device.type != "cuda" or torch.version.hip:
        return (PlainTile,)
    capability = torch.cuda.get_device_capability(device)
    kernels: tuple[type[Tile], ...] = (PlainTile,)
    if capability >= (8, 0):
        kernels += (DecodeTile,)
    if capability == (9, 0) and triton.__version__.startswith(GLUON_RELEASES):
        kernels += (GluonTile,)
    return kernels


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for anything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def programmatic(device: torch.device) -> bool:
    """Whether a kernel may start, and read weights, while the one before it still runs."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


def run(x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: Tile | None, early: bool) -> None:
    """Enqueue out [M, N] = x [M, K] W^T + bias with `tile`, or with the best one known."""
    if out.numel():
        rows, columns = weight.out_features, weight.in_features
        chosen = tile or choose_tile(rows, columns, x.shape[0], x.device, _aligned(x), weight.bits)
        _check_tile(chosen, x, weight)
        launch(x, weight, bias, out, chosen, early)


def launch(x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: Tile, early: bool) -> None:
    """Enqueue one kernel on the current stream. x: [M, K], out: [M, N]; `early` as in `programmatic`."""
    kernel, grid, arguments, options = prepare(x, weight, bias, out, tile, early)
    kernel[grid](*arguments, **options)


def prepare(
    x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: Tile, early: bool
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """The kernel, grid, arguments and options of a launch."""
    if isinstance(tile, GluonTile):
        return _prepare_gluon(x, weight, bias, out, tile, early)
    if isinstance(tile, DecodeTile):
        return _prepare_decode(x, weight, bias, out, tile, early)
    blocks = min(tile.blocks, 1 << (weight.blocks.bit_length() - 1))
    grid = (-(-weight.blocks // blocks), -(-x.shape[0] // tile.tokens))
    sizes = (x.shape[0], weight.out_features, weight.in_features, weight.chunks)
    flags = (weight.group_size, weight.zeros is not None, bias is not None, weight.bits, _dot_dtype(x.dtype))
    arguments = (x, *_pointers(weight, bias), out, 2.0**weight.exponent, *sizes, blocks, tile.tokens, *flags)
    return w4a16_plain_kernel, grid, arguments, {"num_warps": 4, "enable_fp_fusion": True}


def _prepare_decode(
    x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: DecodeTile, early: bool
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    tokens = -(-x.shape[0] // tile.tokens)
    size = 16 * tile.row_tiles
    row_tiles = -(-weight.out_features // size)
    shared = row_tiles * tokens if tile.split > 1 else 0
    partials, counters = workspace(x.device, shared, shared * tile.split * size * tile.tokens)
    whole = weight.in_features % (128 * tile.warps) == 0 and weight.in_features >= 128 * tile.warps * tile.split
    sizes = (x.shape[0], weight.out_features, weight.in_features, weight.chunks)
    shape = (tile.warps, tile.row_tiles, tile.tokens, 128 // weight.group_size, tile.split)
    flags = (weight.zeros is not None, bias is not None, whole, not INTERPRETED, early, _dot_dtype(x.dtype))
    pointers = (x, *_pointers(weight, bias), out, partials, counters, 2.0**weight.exponent)
    return (
        w4a16_decode_kernel,
        (row_tiles * tile.split, tokens),
        (*pointers, *sizes, *shape, *flags),
        _options(tile, early),
    )


def _prepare_gluon(
    x: Tensor, weight: W4A16Weight, bias: Tensor | None, out: Tensor, tile: GluonTile, early: bool
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    tokens = -(-x.shape[0] // tile.columns)
    tiles = -(-weight.blocks * ROWS // tile.rows) * tokens
    slots, stages = processors(x.device) * tile.resident, -(-weight.chunks // tile.chunks)
    streamed = streamed_tiles(tiles, tile.split, slots)
    programs = program_count(tiles, tile.split, slots, stages)
    if programs * streamed * stages >= 1 << 31:
        raise ValueError(f"{tile} makes too many programs for {tiles} tiles")
    rooms = programs * (1 if tile.split else 2) if streamed else 0
    partials, counters = workspace(x.device, streamed, rooms * tile.rows * tile.columns)
    first, second = (_descriptor(x, count, tile.columns) for count in (tile.tokens, tile.more_tokens or tile.tokens))
    words, scales, zeros, bias_or_any = _pointers(weight, bias)
    pointers = (first, second, _word_descriptor(weight, tile), scales, zeros, bias_or_any, out)
    sizes = (x.shape[0], weight.out_features, weight.chunks, weight.blocks, tokens, streamed)
    ring = (tile.stages(weight.bits), tile.warps, tile.row_blocks, tile.chunks, tile.ring_chunks(weight.bits))
    shape = (*ring, weight.group_size, tile.tokens, tile.more_tokens)
    flags = (tile.split, weight.zeros is not None, bias is not None, weight.bits, early)
    arguments = (*pointers, partials, counters, 2.0**weight.exponent, *sizes, *shape, *flags)
    return w4a16_gluon_kernel, (programs,), arguments, _options(tile, early) | {"maxnreg": tile.registers}


def _options(tile: DecodeTile | GluonTile, early: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": tile.warps, "enable_fp_fusion": True}
    return options | {"launch_pdl": True} if early else options


def _pointers(weight: W4A16Weight, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words, scales, zero points and bias; a kernel does not touch what stands in for those that are None."""
    zeros = weight.scales if weight.zeros is None else weight.zeros
    return weight.words, weight.scales, zeros, weight.scales if bias is None else bias


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the plain code multiplies: the interpreter's dot takes the raw bits of bfloat16 for numbers."""
    return tl.float32 if INTERPRETED and dtype == torch.bfloat16 else TRITON_DTYPES[dtype]


def _descriptor(x: Tensor, tokens: int, width: int) -> TensorDescriptor:
    """Boxes of `tokens` rows by 64 columns of x, in tiles of `width` tokens."""
    shape = [readable_rows(x, width), x.shape[1]]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(x, shape, [x.shape[1], 1], [tokens, COLUMNS], layout)


def _word_descriptor(weight: W4A16Weight, tile: GluonTile) -> TensorDescriptor:
    """Words with K outermost, so that a box holds chunk after chunk."""
    words = weight.words.view(weight.blocks, -1, 16, COLUMNS).permute(1, 0, 2, 3)
    box = [tile.ring_chunks(weight.bits) * weight.bits // 4, tile.rows // ROWS, 16, COLUMNS]
    return TensorDescriptor.from_tensor(words, box, gl.NVMMASharedLayout(128, 16, 4))


def workspace(device: torch.device, tiles: int, size: int) -> tuple[Tensor, Tensor]:
    """Room for `size` partial sums of the tiles that programs share, and counters that are zero between launches."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters(device, stream)
    if tiles > COUNTERS:
        raise ValueError(f"K cannot be split for {tiles} tiles: at most {COUNTERS}")
    partials = torch.empty(size, dtype=torch.float32, device=device) if tiles else counters.view(torch.float32)
    return partials, counters


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """One set for each stream, since launches on different streams may run at the same time."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _check_tile(tile: Tile, x: Tensor, weight: W4A16Weight) -> None:
    if type(tile) not in supported_kernels(x.device) or (isinstance(tile, DecodeTile) and weight.bits == 8):
        raise ValueError(f"{x.device} does not run {type(tile).__name__} kernels on {weight.bits}-bit codes")
    if isinstance(tile, GluonTile):
        if not _aligned(x):
            raise ValueError("the Gluon kernel needs rows of x that begin at multiples of 16 bytes")
        if tile.stages(weight.bits) < 2 or tile.split > -(-weight.chunks // tile.chunks):
            raise ValueError(f"{tile} does not fit shared memory or K = {weight.in_features}")


def _aligned(x: Tensor) -> bool:
    """Whether the copy engine can read x [M, K]."""
    return x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0


def _check(x: Tensor, weight: W4A16Weight, bias: Tensor | None) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}], not {list(x.shape)}")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but the weight was prepared for {weight.dtype}")
    if x.device != weight.words.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.words.device}")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError("the kernels need a GPU, or TRITON_INTERPRET=1 in the environment")
    if bias is not None and (bias.shape != (weight.out_features,) or bias.dtype != x.dtype or bias.device != x.device):
        wanted = f"[{weight.out_features}] {x.dtype} on {x.device}"
        raise ValueError(f"bias must be {wanted}, not {list(bias.shape)} {bias.dtype} on {bias.device}")
