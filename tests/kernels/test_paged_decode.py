"""Decode attention over a cache in blocks against its reference; fp16 in the interpreter, bf16 too on a GPU."""

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.bench.kernels_attention import Heads, poison_unwritten, random_cache, scattered_pages
from quantlab_kernels import ref_attention
from quantlab_kernels.decode_parts import Plan
from quantlab_kernels.kv_cache import KVCache, Pages
from quantlab_kernels.paged_decode import paged_decode

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Relative RMSE against fp32. The output's own rounding is 2.0e-4 in fp16 and 1.6e-3 in bf16; an H200 gave 2.4e-3 on
# 2026-11-22 for bf16 over a bf16 cache and 1.7e-3 over an INT8 one (against the dequantized cache).
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Empty, one token, within a block, a whole block, one more, several with a rest.
LENGTHS = [0, 1, 7, 16, 17, 150]


def case(lengths: list[int], heads: Heads, dtype: torch.dtype, int8: bool) -> tuple[torch.Tensor, KVCache, Pages]:
    pages, blocks = scattered_pages(lengths, heads, DEVICE)
    q = torch.randn(len(lengths), heads.query, heads.dim, device=DEVICE).to(dtype)
    cache = random_cache(heads, blocks, q, int8)
    poison_unwritten(cache, pages)
    return q, cache, pages


def assert_matches_reference(q: torch.Tensor, cache: KVCache, pages: Pages, window: int | None = None, plan=None):
    out = torch.full_like(q, float("nan"))
    result = paged_decode(q, cache, pages, window=window, out=out, plan=plan)
    assert result is out
    exact = ref_attention.paged_decode(q.float(), cache, pages, window=window)
    assert relative_rmse(out, exact) < TOLERANCE[q.dtype]
    empty = pages.lengths == 0
    assert not out[empty].any()
    for row, expected in zip(out[~empty], exact[~empty], strict=True):
        assert relative_rmse(row, expected) < TOLERANCE[q.dtype]
    again = paged_decode(q, cache, pages, window=window, plan=plan)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
def test_decode_matches_the_reference(heads: int, kv_heads: int, head_dim: int, int8: bool, dtype: torch.dtype):
    assert_matches_reference(*case(LENGTHS, Heads(heads, kv_heads, head_dim), dtype, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (7, 1), (12, 1), (20, 2)])
def test_any_number_of_query_heads_shares_a_kv_head(heads: int, kv_heads: int, int8: bool):
    assert_matches_reference(*case([33, 70], Heads(heads, kv_heads, 64), torch.float16, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_a_window_hides_what_lies_before_it(window: int, int8: bool):
    q, cache, pages = case([0, 1, 16, 17, 41, 150], Heads(4, 1, 64), torch.float16, int8)
    exact = ref_attention.paged_decode(q.float(), cache, pages, window=window)
    # Blocks wholly before the window may have gone to another sequence: nothing in them may reach the result.
    for row, length in zip(pages.blocks, pages.lengths.tolist(), strict=True):
        gone = row[: max(0, length - window) // 16].long()
        for x in (cache.k, cache.v) if cache.scales is None else (cache.scales,):
            x[gone] = float("nan")
    out = paged_decode(q, cache, pages, window=window)
    assert not out[0].any()
    assert relative_rmse(out, exact) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 48])
def test_blocks_may_be_larger(block_size: int, int8: bool):
    assert_matches_reference(*case([0, 1, 64, 65, 130], Heads(4, 1, 64, block_size), torch.float16, int8))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize("plan", [Plan(2, 32, 2, 1), Plan(2, 32, 2, 7), Plan(1, 64, 3, 17), Plan(4, 64, 3, 18)])
def test_every_way_of_cutting_gives_the_same_answer(plan: Plan, int8: bool):
    q, cache, pages = case([0, 1, 32, 33, 200], Heads(4, 1, 64), torch.float16, int8)
    assert_matches_reference(q, cache, pages, plan=plan)


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_the_grid_may_be_made_for_longer_sequences(int8: bool):
    q, cache, pages = case([3, 40], Heads(4, 1, 64), torch.float16, int8)
    longer = Pages(pages.blocks, pages.lengths, 4096)
    out = paged_decode(q, cache, longer)
    assert relative_rmse(out, ref_attention.paged_decode(q.float(), cache, pages)) < TOLERANCE[q.dtype]


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_queries_may_be_a_view_of_a_fused_projection(int8: bool):
    q, cache, pages = case([5, 40], Heads(4, 1, 64), torch.float16, int8)
    fused = torch.cat((q, torch.full_like(q, float("nan"))), 1)
    assert torch.equal(paged_decode(fused[:, :4], cache, pages), paged_decode(q, cache, pages))


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_a_graph_replays_for_other_lengths(int8: bool):
    q, cache, pages = case([4000, 1, 0, 2048, 333], Heads(8, 2, 128), torch.bfloat16, int8)
    stream, out = torch.cuda.Stream(), torch.empty_like(q)
    with torch.cuda.stream(stream):
        paged_decode(q, cache, pages, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        paged_decode(q, cache, pages, out=out)
    for lengths in ([4000, 1, 0, 2048, 333], [1, 0, 0, 2047, 16], [17, 1, 0, 1, 332]):
        pages.lengths.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        exact = ref_attention.paged_decode(q.float(), cache, pages)
        assert relative_rmse(out, exact) < TOLERANCE[q.dtype]


def test_large_and_tiny_scores_survive():
    """Scores far beyond what exp2 holds, a row of zeros, and keys as large as fp16 goes."""
    q, cache, pages = case([40, 40, 40], Heads(4, 1, 64), torch.float16, int8=False)
    q[0] *= 200
    q[1] = 0
    cache.k[pages.blocks[2, :3].long()] *= 10000
    poison_unwritten(cache, pages)
    assert_matches_reference(q, cache, pages)


def test_no_sequences_give_no_rows():
    q, cache, pages = case([], Heads(4, 1, 64), torch.float16, int8=False)
    assert paged_decode(q, cache, pages).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, c, p: (q.float(), c, p), "q is torch.float32"),
        (lambda q, c, p: (q[:, :3], c, Pages(p.blocks, p.lengths, 9)), None),
        (lambda q, c, p: (q[:1], c, p), "one row a sequence"),
        (lambda q, c, p: (q.transpose(1, 2).contiguous().transpose(1, 2), c, p), "contiguous"),
        (lambda q, c, p: (q[..., :32], c, p), r"q must be \[T, 4, 64\]"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused_in_one_sentence(change, sentence: str | None):
    q, cache, pages = case([5, 40], Heads(4, 2, 64), torch.float16, int8=False)
    with pytest.raises(ValueError, match=sentence or r"q must be \[S, n \* 2, D\]"):
        paged_decode(*change(q, cache, pages))


def test_a_window_of_no_token_is_refused():
    with pytest.raises(ValueError, match="one token at least"):
        paged_decode(*case([5], Heads(4, 1, 64), torch.float16, int8=False), window=0)
