"""The cache writer against its reference, and the layout against its definition byte by byte."""

import pytest
import torch
from torch import Tensor

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.models.rope import rotate
from quantlab_kernels import ref_attention
from quantlab_kernels.kv_cache import HeadNorm, KVCache, Pages, Rope, empty_cache, write_kv

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def projections(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one fused projection."""
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=DEVICE).to(dtype)
    return list(fused.split([heads, kv_heads, kv_heads], dim=1))


def rope(tokens: int, turning: int) -> Rope:
    angles = torch.arange(200, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(0, turning, 2, device=DEVICE) / turning)
    return Rope(angles.cos(), angles.sin(), torch.randint(0, 200, (tokens,), device=DEVICE))


def zeros(head_dim: int, kv_heads: int, block_size: int, like: Tensor, int8: bool) -> KVCache:
    cache = empty_cache(6, kv_heads, block_size, head_dim, like, int8)
    for x in (cache.k, cache.v, cache.scales):
        if x is not None:
            x.zero_()
    return cache


def written_by_both(
    qkv: list[Tensor], slots: Tensor, int8: bool, turns: Rope | None, norm: HeadNorm | None = None, block_size: int = 16
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and the cache after the kernel, and after the reference."""
    both = []
    for write in (write_kv, ref_attention.write_kv):
        fused = torch.cat(qkv, 1)
        q, k, v = fused.split([x.shape[1] for x in qkv], dim=1)
        cache = zeros(q.shape[2], k.shape[1], block_size, q, int8)
        write(cache, q, k, v, slots, turns, norm)
        assert torch.equal(v, qkv[2])
        both.append([q, k, cache.k, cache.v] + ([] if cache.scales is None else [cache.scales]))
    return both[0], both[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_without_rotation_the_cache_is_the_reference_bit_for_bit(head_dim: int, int8: bool, dtype: torch.dtype):
    slots = torch.randperm(96, device=DEVICE)[:21]
    slots[[3, 9]] = -1
    for ours, expected in zip(*written_by_both(projections(21, 4, 2, head_dim, dtype), slots, int8, None), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize(("head_dim", "turning"), [(64, 64), (96, 96), (128, 128), (128, 32), (256, 256), (96, 40)])
def test_rotation_matches_the_reference(head_dim: int, turning: int, int8: bool, dtype: torch.dtype):
    turns = rope(5, turning)
    slots = torch.tensor([0, 95, 17, 16, -1], device=DEVICE)
    assert_close(*written_by_both(projections(5, 3, 1, head_dim, dtype), slots, int8, turns), dtype)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_norm_comes_before_rotation(int8: bool, turns: bool):
    qkv = projections(7, 5, 3, 64, torch.float16)
    norm = HeadNorm(torch.randn(64, device=DEVICE).half(), torch.randn(64, device=DEVICE).half(), 1e-6)
    slots = torch.randperm(192, device=DEVICE)[:7]
    ours, expected = written_by_both(qkv, slots, int8, rope(7, 64) if turns else None, norm, block_size=32)
    assert_close(ours, expected, torch.float16)


def assert_close(ours: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """16-bit values within a rounding of each other, codes within one and rarely."""
    step = torch.finfo(dtype).eps
    for x, y in zip(ours, expected, strict=True):
        if x.dtype == torch.int8:
            moved = (x.int() - y.int()).abs()
            assert moved.max() <= 1 and (moved > 0).float().mean() < 0.01
        else:
            assert relative_rmse(x, y) < step / 4
            torch.testing.assert_close(x, y, rtol=2 * step, atol=step)


def test_rotation_is_that_of_the_model():
    # The model computes in x.dtype, here fp32, as the writer does whatever the dtype.
    x = torch.randn(1, 2, 9, 64)
    turns = rope(9, 64)
    tables = tuple(table[turns.positions].repeat(1, 2).cpu() for table in (turns.cos, turns.sin))
    moved = Rope(turns.cos.cpu(), turns.sin.cpu(), turns.positions.cpu())
    ours = ref_attention.turn(x[0].transpose(0, 1), moved)
    torch.testing.assert_close(ours, rotate(x, tables)[0].transpose(0, 1))


def test_int8_values_lie_in_transposed_tiles_of_four_by_four():
    """The definition of the layout, byte by byte."""
    v = torch.randint(-128, 128, (16, 96)).to(torch.int8)
    tiled = ref_attention.tile_values(v).flatten()
    for token in (0, 1, 4, 7, 15):
        for channel in (0, 1, 4, 33, 95):
            assert tiled[channel // 4 * 64 + token // 4 * 16 + channel % 4 * 4 + token % 4] == v[token, channel]


def test_tiling_is_undone():
    v = torch.randint(-128, 128, (2, 3, 48, 128)).to(torch.int8)
    assert torch.equal(ref_attention.untile_values(ref_attention.tile_values(v)), v)


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_what_was_written_is_read_back(int8: bool):
    q, k, v = projections(40, 2, 2, 64, torch.float16)
    cache = zeros(64, 2, 16, q, int8)
    blocks = torch.tensor([[4, 1, 5]], dtype=torch.int32, device=DEVICE)
    token = torch.arange(40, device=DEVICE)
    write_kv(cache, q, k, v, blocks[0][token // 16].long() * 16 + token % 16, None)
    pages = Pages(blocks, torch.tensor([40], dtype=torch.int32, device=DEVICE), 40)
    for read, written in zip(ref_attention.read_kv(cache, pages.blocks[0], 40), (k, v), strict=True):
        # Half a step of 1/127 of the largest of 64 normal channels, uniform: about 0.8 % of their root mean square.
        assert relative_rmse(read, written) < (1e-2 if int8 else 1e-7)


def test_a_row_of_zeros_quantizes_to_zeros():
    q, k, v = (torch.zeros(1, 1, 64, device=DEVICE).half() for _ in "qkv")
    cache = zeros(64, 1, 16, q, int8=True)
    write_kv(cache, q, k, v, torch.tensor([3], device=DEVICE), None)
    assert not cache.k.any() and not cache.v.any()
    assert torch.isfinite(cache.scales).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, k, v, s: (q, k[:3], v, s), "differ in tokens"),
        (lambda q, k, v, s: (q, k, v, s.int()), "int64"),
        (lambda q, k, v, s: (q, k[:, :1], v, s), r"k must be \[T, 2, 64\]"),
        (lambda q, k, v, s: (q.float(), k, v, s), "q is torch.float32"),
    ],
)
def test_what_the_writer_cannot_read_is_refused_in_one_sentence(change, sentence: str):
    qkv = projections(4, 4, 2, 64, torch.float16)
    cache = zeros(64, 2, 16, qkv[0], int8=False)
    q, k, v, slots = change(*qkv, torch.arange(4, device=DEVICE))
    with pytest.raises(ValueError, match=sentence):
        write_kv(cache, q, k, v, slots, None)


@pytest.mark.parametrize(("head_dim", "block_size", "sentence"), [(80, 16, "head_dim is 80"), (64, 24, "multiple")])
def test_a_cache_no_kernel_reads_is_refused(head_dim: int, block_size: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        empty_cache(2, 1, block_size, head_dim, torch.zeros(1).half(), int8=True)


def test_more_channels_than_the_head_has_cannot_turn():
    q, k, v = projections(2, 1, 1, 64, torch.float16)
    with pytest.raises(ValueError, match="128 channels cannot turn in heads of 64"):
        write_kv(zeros(64, 1, 16, q, False), q, k, v, torch.arange(2, device=DEVICE), rope(2, 128))
