"""Causal attention of chunks over a cache in blocks against its reference; fp16 interpreted, bf16 too on a GPU."""

import pytest
import torch
from torch import Tensor

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.bench.kernels_attention import Heads, poison_unwritten, random_cache, scattered_pages
from quantlab_kernels import ref_attention
from quantlab_kernels.kv_cache import KVCache, Pages
from quantlab_kernels.paged_dequantize import dequantize_pages
from quantlab_kernels.paged_prefill import Chunks, paged_prefill

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Relative RMSE against fp32, about three times what an H200 gave on 2026-11-22: 3e-4 in fp16, 2.3e-3 in bf16 (rounding
# the weights to 16 bits adds to that of the output).
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# (tokens in all, new ones): nothing new, one token alone, one after a prefix, a chunk that ends on a block's border,
# one that begins and ends within blocks, more than a tile.
SEQUENCES = [(0, 0), (1, 1), (40, 1), (32, 32), (75, 30), (20, 0), (150, 150)]


def case(
    sequences: list[tuple[int, int]], heads: Heads, dtype: torch.dtype, int8: bool
) -> tuple[Tensor, KVCache, Pages, Chunks]:
    pages, blocks = scattered_pages([length for length, _ in sequences], heads, DEVICE)
    counts = torch.tensor([0] + [new for _, new in sequences])
    starts = counts.cumsum(0).to(torch.int32).to(DEVICE)
    q = torch.randn(int(counts.sum()), heads.query, heads.dim, device=DEVICE).to(dtype)
    cache = random_cache(heads, blocks, q, int8)
    poison_unwritten(cache, pages)
    return q, cache, pages, Chunks(starts, int(counts.max()))


def assert_matches_reference(q: Tensor, cache: KVCache, pages: Pages, chunks: Chunks, window: int | None = None):
    out = torch.full_like(q, float("nan"))
    result = paged_prefill(q, cache, pages, chunks, window=window, out=out)
    assert result is out
    exact = ref_attention.paged_prefill(q.float(), cache, pages, chunks.starts, window=window)
    assert relative_rmse(out, exact) < TOLERANCE[q.dtype]
    for row, expected in zip(out, exact, strict=True):
        assert relative_rmse(row, expected) < 1.5 * TOLERANCE[q.dtype]
    assert torch.equal(paged_prefill(q, cache, pages, chunks, window=window), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
def test_prefill_matches_the_reference(heads: int, kv_heads: int, head_dim: int, int8: bool, dtype: torch.dtype):
    assert_matches_reference(*case(SEQUENCES, Heads(heads, kv_heads, head_dim), dtype, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (7, 1), (40, 2)])
def test_any_number_of_query_heads_shares_a_kv_head(heads: int, kv_heads: int, int8: bool):
    assert_matches_reference(*case([(70, 33), (5, 5)], Heads(heads, kv_heads, 64), torch.float16, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("window", [1, 16, 50, 100, 1000])
def test_a_window_hides_what_lies_before_it(window: int, int8: bool):
    q, cache, pages, chunks = case([(200, 40), (7, 7), (150, 150)], Heads(4, 1, 64), torch.float16, int8)
    exact = ref_attention.paged_prefill(q.float(), cache, pages, chunks.starts, window=window)
    # Blocks wholly before the first query's window may have gone to another sequence.
    gone = pages.blocks[0][: max(0, 200 - 40 + 1 - window) // 16].long()
    for x in (cache.k, cache.v) if cache.scales is None else (cache.scales,):
        x[gone] = float("nan")
    out = paged_prefill(q, cache, pages, chunks, window=window)
    assert relative_rmse(out, exact) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_a_window_of_many_steps_is_masked_at_both_edges(int8: bool):
    assert_matches_reference(*case([(700, 60), (450, 1)], Heads(4, 1, 64), torch.float16, int8), window=333)


def test_an_int8_cache_is_dequantized_a_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch):
    arguments = case([(70, 33), (5, 5), (90, 1), (0, 0), (64, 20)], Heads(4, 2, 64), torch.float16, int8=True)
    at_once = paged_prefill(*arguments)
    monkeypatch.setattr("quantlab_kernels.paged_prefill.DEQUANTIZED_TOKENS", 200)
    assert torch.equal(paged_prefill(*arguments), at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_dequantized_blocks_hold_what_the_cache_holds(block_size: int, dtype: torch.dtype):
    heads = Heads(4, 2, 96, block_size)
    q, cache, pages, chunks = case([(300, 40), (17, 17), (0, 0)], heads, dtype, int8=True)
    for window, first in ((None, 0), (110, 151)):
        wide, where = dequantize_pages(cache, pages, chunks.starts, q, window)
        for sequence, length in enumerate(pages.lengths.tolist()):
            found = ref_attention.read_kv(wide, where.blocks[sequence], length)
            exact = ref_attention.read_kv(cache, pages.blocks[sequence], length)
            seen = first // 16 * 16 if length == 300 else 0
            for x, y in zip(found, exact, strict=True):
                assert torch.equal(x[seen:], y[seen:].to(dtype).float())
                assert not x[seen // 128 * 128 : seen].any()


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("block_size", [32, 48, 64, 128])
def test_blocks_may_be_larger(block_size: int, int8: bool):
    heads = Heads(4, 1, 64, block_size)
    assert_matches_reference(*case([(128, 128), (129, 5), (1, 1), (300, 170)], heads, torch.float16, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_chunks_one_after_the_other_give_what_one_chunk_gives(int8: bool):
    q, cache, pages, chunks = case([(90, 90)], Heads(4, 2, 64), torch.float16, int8)
    whole, pieces = paged_prefill(q, cache, pages, chunks), []
    for begin, end in ((0, 1), (1, 32), (32, 33), (33, 90)):
        starts = torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE)
        until = Pages(pages.blocks, torch.tensor([end], dtype=torch.int32, device=DEVICE), end)
        pieces.append(paged_prefill(q[begin:end], cache, until, Chunks(starts, end - begin)))
    assert relative_rmse(torch.cat(pieces), whole) < TOLERANCE[q.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 300, 700])
@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_many_steps_and_uneven_chunks(int8: bool, head_dim: int, block_size: int, window: int | None):
    heads = Heads(8, 2, head_dim, block_size)
    arguments = case([(1000, 600), (0, 0), (513, 513), (129, 1), (2048, 64), (128, 128)], heads, torch.bfloat16, int8)
    assert_matches_reference(*arguments, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("window", [None, 900])
def test_a_long_chunk_for_one_kv_head(window: int | None, int8: bool):
    assert_matches_reference(*case([(1700, 1500), (300, 200)], Heads(4, 1, 128), torch.bfloat16, int8), window=window)


def test_queries_may_be_a_view_of_a_fused_projection():
    q, cache, pages, chunks = case([(40, 20)], Heads(4, 1, 64), torch.float16, int8=False)
    fused = torch.cat((q, torch.full_like(q, float("nan"))), 1)
    assert torch.equal(paged_prefill(fused[:, :4], cache, pages, chunks), paged_prefill(q, cache, pages, chunks))


def test_large_scores_survive():
    q, cache, pages, chunks = case([(80, 80)], Heads(4, 1, 64), torch.float16, int8=False)
    assert_matches_reference(q * 200, cache, pages, chunks)


def test_no_tokens_give_no_rows():
    q, cache, pages, chunks = case([(20, 0)], Heads(4, 1, 64), torch.float16, int8=False)
    assert paged_prefill(q, cache, pages, chunks).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, c, p, s: (q.float(), c, p, s), "q is torch.float32"),
        (lambda q, c, p, s: (q[:, :3], c, p, s), r"q must be \[T, n \* 2, D\]"),
        (lambda q, c, p, s: (q, c, p, Chunks(s.starts[:-1], 5)), "one entry more"),
        (lambda q, c, p, s: (q.repeat(1, 33, 1), c, p, s), "66 query heads on a KV head"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused_in_one_sentence(change, sentence: str):
    arguments = change(*case([(5, 5), (40, 2)], Heads(4, 2, 64), torch.float16, int8=False))
    with pytest.raises(ValueError, match=sentence):
        paged_prefill(*arguments)
