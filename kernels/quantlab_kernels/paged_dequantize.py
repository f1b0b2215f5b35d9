"""An INT8 cache's tokens as 16-bit blocks in order, for prefill, which reads every key once for each of many queries.

One pass writes what the attention of chunks will read, each value code * scale, rounded once, in blocks as large as a
step of the kernel. Beside the products of a few hundred queries it costs little. Knows nothing about attention.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.decode_parts import NO_WINDOW
from quantlab_kernels.kv_cache import TILE_TOKENS, KVCache, Pages, empty_cache

BLOCK_TOKENS = 128


@triton.jit(do_not_specialize=["table_stride", "window"])
def _dequantize_kernel(
    k_cache, v_cache, scales, blocks, lengths, starts, k_out, v_out, table_stride, out_tokens, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    OUT_BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * TILE
    n = tl.load(lengths + sequence)
    count = tl.load(starts + sequence + 1) - tl.load(starts + sequence)
    # Tokens that no query sees stay unwritten, but for those of a block whose others are seen: 0 * NaN would be NaN.
    lowest = tl.maximum(n - count - window + 1, 0)
    if (first < n) & (first >= lowest // OUT_BLOCK * OUT_BLOCK) & (count > 0):
        token, channel = tl.arange(0, TILE), tl.arange(0, DIM)
        inside = (channel < HEAD_DIM)[None, :]
        seen = first + TILE > lowest
        source = tl.maximum(first, lowest // TILE * TILE)  # a block that exists
        block = tl.load(blocks + sequence * table_stride + source // BLOCK_SIZE).to(tl.int64)
        row = (block * KV_HEADS + head) * BLOCK_SIZE + source % BLOCK_SIZE
        k = tl.load(k_cache + (row + token)[:, None] * HEAD_DIM + channel[None, :], inside, 0).to(tl.float32)
        tiled = (channel // 4 * (4 * TILE) + channel % 4 * 4)[None, :] + (token // 4 * 16 + token % 4)[:, None]
        v = tl.load(v_cache + row * HEAD_DIM + tiled, inside, 0).to(tl.float32)
        k *= tl.load(scales + row * 2 + token)[:, None]
        v *= tl.load(scales + row * 2 + TILE + token)[:, None]
        at = sequence.to(tl.int64) * out_tokens + first
        to = (at // OUT_BLOCK * KV_HEADS + head) * OUT_BLOCK + at % OUT_BLOCK
        to = (to + token)[:, None] * HEAD_DIM + channel[None, :]
        dtype = k_out.dtype.element_ty
        tl.store(k_out + to, tl.where(seen, k, 0.0).to(dtype), inside)
        tl.store(v_out + to, tl.where(seen, v, 0.0).to(dtype), inside)


def dequantize_pages(
    cache: KVCache, pages: Pages, starts: Tensor, like: Tensor, window: int | None
) -> tuple[KVCache, Pages]:
    """The tokens that chunks will read, as a 16-bit cache in like's dtype, and where they lie there.

    cache: INT8; starts: [S + 1] int32, where each chunk begins among the queries. What no query sees stays undefined.
    """
    sequences = pages.lengths.shape[0]
    blocks = triton.cdiv(max(pages.max_length, 1), BLOCK_TOKENS)
    out = empty_cache(sequences * blocks, cache.kv_heads, BLOCK_TOKENS, cache.head_dim, like, int8=False)
    table = torch.arange(sequences * blocks, dtype=torch.int32, device=like.device).view(sequences, blocks)
    _dequantize_kernel[(cache.kv_heads, triton.cdiv(pages.max_length, TILE_TOKENS), sequences)](
        cache.k, cache.v, cache.scales, pages.blocks, pages.lengths, starts, out.k, out.v,
        pages.blocks.shape[1], blocks * BLOCK_TOKENS, window or NO_WINDOW,
        KV_HEADS=cache.kv_heads, HEAD_DIM=cache.head_dim, DIM=triton.next_power_of_2(cache.head_dim),
        BLOCK_SIZE=cache.block_size, OUT_BLOCK=BLOCK_TOKENS, TILE=TILE_TOKENS, num_warps=1,
    )  # fmt: skip
    return out, Pages(table, pages.lengths, pages.max_length)
