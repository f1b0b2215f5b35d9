"""What attention over a cache in blocks means, in plain torch: the text that the attention kernels are compared with.

Runs on any device, sequence by sequence, in fp32 (fp64 where the caller's tensors are). The dataclasses and layouts
are those of `kv_cache`; the signatures are those of the kernels.
"""

import torch
from torch import Tensor

from quantlab_kernels.kv_cache import INT8_MAX, SMALLEST_ABSMAX, TILE_TOKENS, HeadNorm, KVCache, Pages, Rope


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to symmetric INT8: scale = absmax / 127, code = floor(x / scale + 1/2).

    x: [..., D] floating. Returns codes [..., D] int8 and scales [...] fp32. The divisor is a tensor because a GPU
    multiplies by the reciprocal of a scalar, and that moves codes.
    """
    x = x.float()
    absmax = x.abs().amax(-1).clamp_min(SMALLEST_ABSMAX)
    scales = absmax / torch.full_like(absmax, INT8_MAX)
    return torch.floor(x / scales[..., None] + 0.5).to(torch.int8), scales


def tile_values(v: Tensor) -> Tensor:
    """Values of an INT8 cache into the order in which it holds them. v: [..., tokens, D], tokens a multiple of 16."""
    lead, (tokens, head_dim) = v.shape[:-2], v.shape[-2:]
    tiles = v.reshape(*lead, tokens // TILE_TOKENS, 4, 4, head_dim // 4, 4)  # tile, t / 4, t % 4, c / 4, c % 4
    return tiles.movedim((-2, -4, -1, -3), (-4, -3, -2, -1)).reshape(v.shape)


def untile_values(v: Tensor) -> Tensor:
    """The inverse of `tile_values`."""
    lead, (tokens, head_dim) = v.shape[:-2], v.shape[-2:]
    tiles = v.reshape(*lead, tokens // TILE_TOKENS, head_dim // 4, 4, 4, 4)  # tile, c / 4, t / 4, c % 4, t % 4
    return tiles.movedim((-4, -3, -2, -1), (-2, -4, -1, -3)).reshape(v.shape)


def read_kv(cache: KVCache, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence. blocks: [n] int32. Returns two [length, KV heads, D] fp32."""
    used = blocks[: -(-length // cache.block_size)].long()
    k, v = cache.k[used].float(), cache.v[used]
    v = (untile_values(v) if cache.is_int8 else v).float()
    if cache.scales is not None:
        k = k * cache.scales[used][:, :, :, 0].flatten(2)[..., None]
        v = v * cache.scales[used][:, :, :, 1].flatten(2)[..., None]
    k, v = (x.transpose(1, 2).flatten(0, 1)[:length] for x in (k, v))
    return k, v


def attend(q: Tensor, k: Tensor, v: Tensor, last: Tensor, scale: float, window: int | None) -> Tensor:
    """Softmax attention (arXiv 1706.03762, eq. 1) of rows that each see the keys up to one of their own.

    q: [R, H, D], k, v: [n, KV heads, D], last: [R] the last key a row sees (-1: none), window: how many keys back it
    sees. Query heads share KV heads in order (arXiv 2305.13245). Returns [R, H, D] fp32; a row without keys is 0.
    """
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1).float() for x in (k, v))
    scores = torch.einsum("rhd,nhd->hrn", q.float(), k) * scale
    key = torch.arange(k.shape[0], device=q.device)
    seen = key <= last[:, None]
    if window is not None:
        seen &= key > last[:, None] - window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hrn,nhd->rhd", weights, v)


def paged_decode(
    q: Tensor, cache: KVCache, pages: Pages, scale: float | None = None, window: int | None = None
) -> Tensor:
    """One query a sequence over its own tokens. q: [S, H, D]. Returns [S, H, D] in q's dtype."""
    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return paged_prefill(q, cache, pages, starts, scale, window)


def paged_prefill(
    q: Tensor, cache: KVCache, pages: Pages, starts: Tensor, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention of chunks: the queries of a sequence are its last tokens, whose keys the cache holds already.

    q: [T, H, D]; starts: [S + 1] int32, where each chunk begins in q. Returns [T, H, D] in q's dtype.
    """
    out = torch.zeros_like(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = starts.tolist()
    for i, length in enumerate(pages.lengths.tolist()):
        first, end = bounds[i], bounds[i + 1]
        last = torch.arange(length - (end - first), length, device=q.device)
        k, v = read_kv(cache, pages.blocks[i], length)
        out[first:end] = attend(q[first:end], k, v, last, scale, window).to(q.dtype)
    return out


def turn(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first R channels of each head by the angles of its position. x: [T, H, D] -> fp32."""
    cos, sin = (table[rope.positions.long()][:, None] for table in (rope.cos, rope.sin))
    half = cos.shape[-1]
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def write_kv(
    cache: KVCache, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, rope: Rope | None, norm: HeadNorm | None = None
) -> None:
    """What the writer kernel does: see `kv_cache.write_kv`."""
    wide_q, wide_k = q.float(), k.float()
    if norm is not None:
        wide_q, wide_k = (_unit(x, norm.eps) * w.float() for x, w in ((wide_q, norm.q), (wide_k, norm.k)))
    if rope is not None:
        wide_q, wide_k = turn(wide_q, rope), turn(wide_k, rope)
    q.copy_(wide_q)
    k.copy_(wide_k)
    kept = slots >= 0
    block, place = slots[kept] // cache.block_size, slots[kept] % cache.block_size
    if cache.scales is None:
        cache.k[block, :, place], cache.v[block, :, place] = k[kept], v[kept]
        return
    tile, token = place // TILE_TOKENS, place % TILE_TOKENS
    cache.k[block, :, place], cache.scales[block, :, tile, 0, token] = quantize_rows(wide_k[kept])
    codes, cache.scales[block, :, tile, 1, token] = quantize_rows(v[kept])
    channel = torch.arange(cache.head_dim, device=q.device)
    byte = channel // 4 * 64 + (token // 4 * 16 + token % 4)[:, None] + channel % 4 * 4
    heads = torch.arange(cache.kv_heads, device=q.device)
    # Two tokens may share a tile, so each is placed byte by byte.
    tiles = cache.v.view(*cache.k.shape[:2], -1, TILE_TOKENS * cache.head_dim)
    tiles[block[:, None, None], heads[:, None], tile[:, None, None], byte[:, None, :]] = codes


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
