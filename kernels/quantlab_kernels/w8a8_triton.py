"""W8A8 in plain Triton: activations to INT8 token by token, the product with few tokens, and with many on any GPU.

    codes = round(x / scale), scale = absmax / 127.5            one scale a token (ref.quantize_per_token)
    out[m, n] = (sum_k codes[m, k] W[n, k]) * scale[m] * weight_scale[n] + bias[n]

Sums are exact in int32; scales are applied in float32, the token's first. Knows nothing about tiles that were measured.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: a float32 of that size has steps of 1, so adding it rounds to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def load_row(x, row, K, first: tl.constexpr, BK: tl.constexpr):
    """Columns first to first + BK of a row of x [M, K] in float32, 0 past the end."""
    k = first + tl.arange(0, BK)
    return tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def quotient(x, scale, FMA: tl.constexpr):
    """x / scale, correctly rounded, for a positive scalar scale and |x / scale| up to 2^20.

    Markstein's way where multiply-add rounds once (FMA): from the rounded reciprocal, one correction by the remainder,
    which is exact. It takes 4 instructions an element; the division of the library takes 25 and branches. Small scales
    are moved up by a power of two first, so that no remainder is subnormal. The interpreter's own division is exact.
    """
    if FMA:
        up = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
        x *= up
        scale *= up
        inverse = tl.div_rn(1.0, scale)
        q = x * inverse
        q = tl.fma(tl.fma(-q, scale, x), inverse, q)
    else:
        q = x / scale
    return q


@triton.jit(do_not_specialize=["M"])
def quantize_tokens_kernel(x, codes, scales, M, K, BK: tl.constexpr, CHUNKS: tl.constexpr, FMA: tl.constexpr,
                           PDL: tl.constexpr):  # fmt: skip
    """Grid (tokens,). x: [M, K]; codes: [M, K] int8; scales: [M] float32. CHUNKS times BK columns cover K."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    v = load_row(x, row, K, 0, BK)
    largest = tl.max(tl.abs(v))
    for i in tl.static_range(1, CHUNKS):
        largest = tl.maximum(largest, tl.max(tl.abs(load_row(x, row, K, i * BK, BK))))
    scale = tl.div_rn(largest, 127.5)
    scale = tl.where(scale == 0, 1.1920928955078125e-07, scale)  # float32's epsilon, as in the reference
    tl.store(scales + row, scale)
    for i in tl.static_range(CHUNKS):
        if i > 0:
            v = load_row(x, row, K, i * BK, BK)
        y = tl.minimum(tl.maximum(quotient(v, scale, FMA), -128.0), 127.0)
        k = i * BK + tl.arange(0, BK)
        tl.store(codes + row * K + k, (y + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8), mask=k < K)


@triton.jit
def dot4(a, b, c, ASM: tl.constexpr):
    """c plus the products of the four bytes of a and b."""
    if ASM:
        c = tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32,
                                      is_pure=True, pack=1)  # fmt: skip
    else:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c


@triton.jit(do_not_specialize=["N"])
def w8a8_one_token_kernel(x, x_scale, words, scales, bias, out, N, KW, BN: tl.constexpr, BK: tl.constexpr,
                          CHUNKS: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
                          PDL: tl.constexpr):  # fmt: skip
    """Grid (tiles of BN rows,). x: [KW] and words: [N, KW] int32, four codes each; CHUNKS times BK words cover KW.

    Without tensor cores: one token would use an eighth of them, and this way nothing but the bytes of W takes time.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = words + tl.minimum(n, N - 1).to(tl.int64)[:, None] * KW
    w = tl.load(row + k[None, :], mask=(k < KW)[None, :], other=0, eviction_policy="evict_first")
    if PDL:  # weights do not depend on the kernel before this one; everything after this line may
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BN, BK), tl.int32)
    for i in tl.static_range(CHUNKS):
        if i + 1 < CHUNKS:
            kk = (i + 1) * BK + k
            next_w = tl.load(row + kk[None, :], mask=(kk < KW)[None, :], other=0, eviction_policy="evict_first")
        v = tl.load(x + i * BK + k, mask=i * BK + k < KW, other=0)
        acc = dot4(w, tl.broadcast_to(v[None, :], (BN, BK)), acc, ASM)
        if i + 1 < CHUNKS:
            w = next_w
    y = tl.sum(acc, axis=1).to(tl.float32) * tl.load(x_scale)
    y *= tl.load(scales + n, mask=n < N, other=0.0)
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "N"])
def w8a8_plain_kernel(x, x_scales, w, scales, bias, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      BIAS: tl.constexpr):  # fmt: skip
    """Grid (tiles of BM tokens times tiles of BN rows,). x: [M, K] int8, w: [N, K] int8; any sizes."""
    row_tiles = (N + BN - 1) // BN
    m = tl.program_id(0) // row_tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) % row_tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    w_rows = w + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K
    acc = tl.zeros((BM, BN), tl.int32)
    kk = 0
    while kk < K:  # not range(): the interpreter cannot count to a run-time number with every numpy
        xv = tl.load(x_rows + (kk + k)[None, :], mask=(kk + k < K)[None, :], other=0)
        wv = tl.load(w_rows + (kk + k)[:, None], mask=(kk + k < K)[:, None], other=0)
        acc = tl.dot(xv, wv, acc, out_dtype=tl.int32)
        kk += BK
    y = acc.to(tl.float32) * tl.load(x_scales + m, mask=m < M, other=0.0)[:, None]
    y *= tl.load(scales + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    keep = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=keep)
