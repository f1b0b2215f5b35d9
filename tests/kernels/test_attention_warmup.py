"""After the warm-up of a model no attention launch within its limits needs another kernel."""

import pytest
import torch

from quantlab_kernels.attention_warmup import Limits, decode_shapes, warm_attention
from quantlab_kernels.decode_parts import PART_BUCKETS
from quantlab_kernels.kv_cache import KVCache, Pages, Rope, empty_cache, split_qkv, write_kv
from quantlab_kernels.paged_decode import choose_plan, paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill
from quantlab_kernels.warm_up import compilations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel_of(plan) -> tuple[int, ...]:
    """What decides the compiled kernels: all but the number of parts within a bucket."""
    return plan.warps, plan.tokens, plan.stages, sum(plan.parts > bucket for bucket in (1, *PART_BUCKETS))


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 1), (7, 7)])
@pytest.mark.parametrize("window", [None, 700])
def test_the_warmed_shapes_cover_every_step(heads: int, kv_heads: int, int8: bool, window: int | None):
    q = torch.zeros(1, heads, 128, dtype=torch.float16, device=DEVICE)
    cache, limits = empty_cache(1, kv_heads, 16, 128, q, int8), Limits(70, 9000)
    warmed = {kernel_of(choose_plan(q, cache, *shape, window)) for shape in decode_shapes(q, cache, limits, window)}
    for sequences in range(1, limits.sequences + 1):
        for tokens in (*range(1, 200), *range(200, limits.tokens, 97), limits.tokens):
            assert kernel_of(choose_plan(q, cache, sequences, tokens, window)) in warmed
    assert len(warmed) <= 16


@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_a_warm_up_leaves_queries_and_cache_alone(int8: bool):
    fused = torch.randn(1, 8, 64, device=DEVICE).half()
    q, k = fused[:, :4], fused[:, 4:6]
    cache = empty_cache(3, 2, 16, 64, q, int8)
    before = [x.clone() for x in (fused, cache.k, cache.v)]
    table = torch.ones(4, 32, device=DEVICE)
    rope = Rope(table, table, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert warm_attention(q, k, cache, Limits(3, 200), rope, None, {None, 64}) >= 5
    for kept, now in zip(before, (fused, cache.k, cache.v), strict=True):
        assert torch.equal(kept.view(torch.uint8), now.view(torch.uint8))


def step(qkv: torch.Tensor, cache: KVCache, rope: Rope, tokens: int) -> None:
    """A decode step of as many sequences as qkv has rows, all in the same block."""
    q, k, v = split_qkv(qkv, 32, 8, 128)
    slots = torch.full((len(qkv),), -1, dtype=torch.int64, device=DEVICE)
    positions = torch.zeros(len(qkv), dtype=torch.int64, device=DEVICE)
    write_kv(cache, q, k, v, slots, Rope(rope.cos, rope.sin, positions))
    blocks = torch.zeros(len(qkv), -(-tokens // 16), dtype=torch.int32, device=DEVICE)
    lengths = torch.full((len(qkv),), tokens, dtype=torch.int32, device=DEVICE)
    paged_decode(q, cache, Pages(blocks, lengths, tokens, settled=True))


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True], ids=["16bit", "int8"])
def test_after_the_warm_up_a_step_compiles_nothing(int8: bool):
    qkv = torch.randn(40, 48 * 128, device=DEVICE).bfloat16()
    q, k, _ = split_qkv(qkv, 32, 8, 128)
    cache, table = empty_cache(1, 8, 16, 128, q, int8), torch.ones(4096, 64, device=DEVICE)
    for x in (cache.k, cache.v, *(() if cache.scales is None else (cache.scales,))):
        x.zero_()
    rope = Rope(table, table, torch.zeros(40, dtype=torch.int64, device=DEVICE))
    warm_attention(q, k, cache, Limits(40, 4096, settled=True), rope, None, {None})
    with compilations() as names:
        for sequences in (1, 2, 3, 7, 16, 17, 33, 40):
            for tokens in (1, 15, 16, 100, 513, 2000, 4096):
                step(qkv[:sequences], cache, rope, tokens)
        for tokens in (1, 17, 40):
            starts = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
            blocks = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
            pages = Pages(blocks, torch.tensor([100], dtype=torch.int32, device=DEVICE), 100)
            paged_prefill(q[:tokens], cache, pages, Chunks(starts, tokens))
    assert not names
