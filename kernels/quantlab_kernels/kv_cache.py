"""Keys and values of a layer in blocks of tokens, and the one kernel that writes them.

A cache of 16-bit floats is plain: k and v [blocks, KV heads, block_size, D]. An INT8 cache keeps k so too, a scale per
token and head beside it, and v in the order in which tensor cores take it as their left operand: every 16 tokens of
a head are cut in tiles of 4 channels x 4 tokens and each tile is transposed, so byte
`channel / 4 * 64 + token / 4 * 16 + channel % 4 * 4 + token % 4`. Scales are fp32
[blocks, KV heads, block_size / 16, {k, v}, 16 tokens].

The writer also turns queries and keys (RoPE, arXiv 2104.09864, pairs (i, i + R/2)), after RMSNorm where a family has
it, in fp32 with one rounding at the end. Knows nothing about who owns which block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantlab_kernels.launch import has_pdl, require, require_gpu

HEAD_DIMS = (64, 96, 128, 256)
TILE_TOKENS = 16  # tokens of an INT8 tile, and the multiple that a block's size must be of
INT8_MAX = 127.0
# The scale of a row of zeros: any positive number serves.
SMALLEST_ABSMAX = 1e-20


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's cache: k, v: [blocks, KV heads, block_size, D] fp16, bf16 or int8 (v tiled, see the module); scales:
    [blocks, KV heads, block_size / 16, 2, 16] fp32 for int8, else None."""

    k: Tensor
    v: Tensor
    scales: Tensor | None

    def __post_init__(self) -> None:
        blocks, heads, block_size, head_dim = self.k.shape
        require(head_dim in HEAD_DIMS, f"head_dim is {head_dim}; the attention kernels know {HEAD_DIMS}")
        require(block_size % TILE_TOKENS == 0, f"block_size is {block_size}; it must be a multiple of {TILE_TOKENS}")
        require(self.v.shape == self.k.shape and self.v.dtype == self.k.dtype, "k and v differ in shape or dtype")
        require(self.k.is_contiguous() and self.v.is_contiguous(), "the cache must be contiguous")
        require(self.is_int8 == (self.k.dtype == torch.int8), "an int8 cache has scales, and no other one does")
        if self.scales is not None:
            expected = (blocks, heads, block_size // TILE_TOKENS, 2, TILE_TOKENS)
            require(self.scales.shape == expected, f"scales must be {list(expected)}")
            require(
                self.scales.dtype == torch.float32 and self.scales.is_contiguous(), "scales must be contiguous fp32"
            )
        else:
            require(self.k.dtype in (torch.float16, torch.bfloat16), f"a cache of {self.k.dtype} is not known")

    @property
    def is_int8(self) -> bool:
        """Whether keys and values are codes with scales."""
        return self.scales is not None

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values have."""
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.k.shape[3]


@dataclass(frozen=True, slots=True)
class Pages:
    """Where sequences lie. blocks: [S, most blocks] int32, numbers of cache blocks in order; lengths: [S] int32, tokens
    of each sequence, those of the current step included; max_length: what no length exceeds, known to the host.

    settled: a promise that the launch just ahead of an attention kernel (`write_kv`, say) does not write blocks or
    lengths, so that the kernel may read them, and fetch what they point to, before that launch has ended.
    """

    blocks: Tensor
    lengths: Tensor
    max_length: int
    settled: bool = False

    def __post_init__(self) -> None:
        require(self.blocks.dtype == self.lengths.dtype == torch.int32, "blocks and lengths must be int32")
        require(self.blocks.dim() == 2 and self.lengths.shape == self.blocks.shape[:1], "blocks [S, n], lengths [S]")
        require(self.blocks.is_contiguous() and self.lengths.is_contiguous(), "blocks and lengths must be contiguous")
        require(self.blocks.device == self.lengths.device, "blocks and lengths must be on one device")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotations: cos, sin: [positions, R/2] fp32, R <= D (channels from R on stay); positions: [T] int32 or int64."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over each head before the rotation: q, k: [D] weights, eps added to the mean square."""

    q: Tensor
    k: Tensor
    eps: float


def empty_cache(blocks: int, kv_heads: int, block_size: int, head_dim: int, like: Tensor, int8: bool) -> KVCache:
    """A cache of `blocks` blocks on like's device, in like's dtype or INT8; contents are undefined until written."""
    dtype = torch.int8 if int8 else like.dtype
    k, v = (torch.empty(blocks, kv_heads, block_size, head_dim, dtype=dtype, device=like.device) for _ in "kv")
    shape = (blocks, kv_heads, block_size // TILE_TOKENS, 2, TILE_TOKENS)
    return KVCache(k, v, torch.empty(shape, dtype=torch.float32, device=like.device) if int8 else None)


def split_qkv(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [M, H, D], k and v [M, KV heads, D] of a fused projection [M, (H + 2 KV heads) D]; nothing is copied."""
    q, k, v = qkv.view(-1, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@triton.jit
def _rms(x, rest, weight, at, rest_at, mask, rest_mask, eps, HEAD_DIM: tl.constexpr):
    """1 / rms of rows whose channels lie in x ([rows, 2, pairs]) and rest, and both scaled by it and the weight."""
    square = tl.sum(tl.sum(x * x, 2), 1) + tl.sum(rest * rest, 1)
    inverse = 1.0 / tl.sqrt(square / HEAD_DIM + eps)
    x = x * inverse[:, None, None] * tl.load(weight + at, mask, 0.0).to(tl.float32)[None, :, :]
    rest = rest * inverse[:, None] * tl.load(weight + rest_at, rest_mask, 0.0).to(tl.float32)[None, :]
    return x, rest


@triton.jit
def _write_kernel(
    q, k, v, q_stride, k_stride, v_stride, cos, sin, positions, q_norm, k_norm, eps,
    k_cache, v_cache, scales, slots, q_heads, kv_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr, INT8: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        # In this order: attention fills the GPU in one even wave only if what came before this kernel is gone by then.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # HALF: pairs that turn (0: none); PAIRS, REST, DIM: powers of two that hold the pairs, the other channels, all.
    token = tl.program_id(0).to(tl.int64)
    tiles_q = tl.cdiv(q_heads, HEADS)
    is_k = tl.program_id(1) >= tiles_q
    head = (tl.program_id(1) - tl.where(is_k, tiles_q, 0)) * HEADS + tl.arange(0, HEADS)
    head_ok = head < tl.where(is_k, kv_heads, q_heads)
    x = tl.where(is_k, k + token * k_stride, q + token * q_stride)
    # A row as [2, pairs] and the channels after them, so that each thread holds both channels of a pair.
    pair, side, other = tl.arange(0, PAIRS), tl.arange(0, 2), tl.arange(0, REST)
    at, rest_at = side[:, None] * HALF + pair[None, :], 2 * HALF + other
    at_ok, rest_ok = (side[:, None] >= 0) & (pair < HALF)[None, :], rest_at < HEAD_DIM
    where = x + (head * HEAD_DIM)[:, None, None] + at[None, :, :]
    where_rest = x + (head * HEAD_DIM)[:, None] + rest_at[None, :]
    ok, ok_rest = head_ok[:, None, None] & at_ok[None, :, :], head_ok[:, None] & rest_ok[None, :]
    y, rest = tl.load(where, ok, 0.0).to(tl.float32), tl.load(where_rest, ok_rest, 0.0).to(tl.float32)
    if NORM:
        weight = tl.where(is_k, k_norm, q_norm)
        y, rest = _rms(y, rest, weight, at, rest_at, at_ok, rest_ok, eps, HEAD_DIM)
    if HALF > 0:
        position = tl.load(positions + token)
        c = tl.load(cos + position * HALF + pair, pair < HALF, 0.0)[None, None, :]
        s = tl.load(sin + position * HALF + pair, pair < HALF, 0.0)[None, None, :]
        first, second = tl.split(tl.permute(y, (0, 2, 1)))
        partner = tl.permute(tl.join(-second, first), (0, 2, 1))
        y = y * c + partner * s
    if HALF > 0 or NORM:
        tl.debug_barrier()  # a small tile is loaded by several threads: all of them before any store over it
        tl.store(where, y.to(q.dtype.element_ty), ok)
        tl.store(where_rest, rest.to(q.dtype.element_ty), ok_rest)
    slot = tl.load(slots + token).to(tl.int64)
    if is_k and slot >= 0:
        inside = slot % BLOCK_SIZE
        # Rows of the cache count tokens: (block * heads + head) * block size + place in the block.
        row = (slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + inside
        channel = tl.arange(0, DIM)
        v_ok = head_ok[:, None] & (channel < HEAD_DIM)[None, :]
        values = tl.load(v + token * v_stride + (head * HEAD_DIM)[:, None] + channel[None, :], v_ok, 0.0)
        to = k_cache + (row * HEAD_DIM)[:, None, None] + at[None, :, :]
        to_rest = k_cache + (row * HEAD_DIM)[:, None] + rest_at[None, :]
        if INT8:
            absmax = tl.maximum(tl.max(tl.max(tl.abs(y), 2), 1), tl.max(tl.abs(rest), 1))
            k_scale = tl.div_rn(tl.maximum(absmax, 1e-20), 127.0)
            tl.store(to, tl.floor(tl.div_rn(y, k_scale[:, None, None] + tl.zeros_like(y)) + 0.5).to(tl.int8), ok)
            codes = tl.floor(tl.div_rn(rest, k_scale[:, None] + tl.zeros_like(rest)) + 0.5)
            tl.store(to_rest, codes.to(tl.int8), ok_rest)
            wide = values.to(tl.float32)
            v_scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 1), 1e-20), 127.0)
            codes = tl.floor(tl.div_rn(wide, v_scale[:, None] + tl.zeros_like(wide)) + 0.5).to(tl.int8)
            t = (inside % TILE).to(tl.int32)
            tiled = channel // 4 * (4 * TILE) + t // 4 * 16 + channel % 4 * 4 + t % 4
            tl.store(v_cache + ((row - t) * HEAD_DIM)[:, None] + tiled[None, :], codes, v_ok)
            at_scale = scales + (row - t) * 2 + t
            tl.store(at_scale, k_scale, head_ok)
            tl.store(at_scale + TILE, v_scale, head_ok)
        else:
            tl.store(to, y.to(k_cache.dtype.element_ty), ok)
            tl.store(to_rest, rest.to(k_cache.dtype.element_ty), ok_rest)
            tl.store(v_cache + (row * HEAD_DIM)[:, None] + channel[None, :], values, v_ok)


def write_kv(
    cache: KVCache, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, rope: Rope | None, norm: HeadNorm | None = None
) -> None:
    """Norm and turn q and k where they lie, and put k and v into the cache.

    q: [T, H, D], k, v: [T, KV heads, D], 16-bit floats whose heads are contiguous (rows may have any stride, as views
    of one fused projection have); slots: [T] int64, block * block_size + place, or -1 for a token that is not kept.
    Writes q and k (unless rope and norm are both None) and the cache, quantized from fp32. Raises ValueError.
    """
    for name, x, heads in (("q", q, q.shape[1]), ("k", k, cache.kv_heads), ("v", v, cache.kv_heads)):
        check_heads(name, x, heads, cache)
    tokens, head_dim = q.shape[0], cache.head_dim
    require(k.shape[0] == v.shape[0] == tokens, "q, k and v differ in tokens")
    require(q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype")
    require(slots.shape == (tokens,) and slots.dtype == torch.int64, "slots must be [T] int64")
    half = _check_rope(rope, tokens, head_dim)
    if norm is not None:
        require(norm.q.shape == norm.k.shape == (head_dim,), f"norm weights must be [{head_dim}]")
    if tokens == 0:
        return
    heads = min(triton.next_power_of_2(cache.kv_heads), max(1, 2048 // triton.next_power_of_2(head_dim)))
    grid = (tokens, triton.cdiv(q.shape[1], heads) + triton.cdiv(cache.kv_heads, heads))
    scales = cache.k if cache.scales is None else cache.scales
    turn = (slots, slots, slots) if rope is None else (rope.cos, rope.sin, rope.positions)
    weights = (q, q, 0.0) if norm is None else (norm.q, norm.k, norm.eps)
    pdl = has_pdl(q)
    _write_kernel[grid](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), *turn, *weights,
        cache.k, cache.v, scales, slots, q.shape[1], cache.kv_heads,
        HEAD_DIM=head_dim, HALF=half, PAIRS=triton.next_power_of_2(max(half, 1)),
        REST=triton.next_power_of_2(max(head_dim - 2 * half, 1)), DIM=triton.next_power_of_2(head_dim),
        HEADS=heads, BLOCK_SIZE=cache.block_size, NORM=norm is not None, INT8=cache.is_int8, TILE=TILE_TOKENS,
        PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip


def check_heads(name: str, x: Tensor, heads: int, cache: KVCache) -> None:
    """Refuse what the attention kernels cannot read: x must be [T, heads, D], 16-bit, heads contiguous, on the GPU."""
    require(x.dim() == 3 and x.shape[1:] == (heads, cache.head_dim), f"{name} must be [T, {heads}, {cache.head_dim}]")
    require(x.stride(2) == 1 and x.stride(1) == cache.head_dim, f"the heads of {name} must be contiguous")
    known = (torch.float16, torch.bfloat16) if cache.is_int8 else (cache.k.dtype,)
    require(x.dtype in known, f"{name} is {x.dtype}; this cache takes {' or '.join(map(str, known))}")
    require(x.device == cache.k.device, f"{name} is on {x.device}, the cache on {cache.k.device}")
    require_gpu(name, x, "ref_attention")


def _check_rope(rope: Rope | None, tokens: int, head_dim: int) -> int:
    """Pairs that turn, 0 without rope."""
    if rope is None:
        return 0
    half = rope.cos.shape[1]
    require(0 < 2 * half <= head_dim, f"{2 * half} channels cannot turn in heads of {head_dim}")
    require(
        rope.cos.shape == rope.sin.shape and rope.positions.shape == (tokens,), "cos, sin: [P, R/2]; positions: [T]"
    )
    require(rope.cos.dtype == rope.sin.dtype == torch.float32, "cos and sin must be fp32")
    require(rope.cos.is_contiguous() and rope.sin.is_contiguous(), "cos and sin must be contiguous")
    return half
