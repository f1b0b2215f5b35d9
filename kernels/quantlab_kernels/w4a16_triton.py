"""W4A16 and W8A16 in plain Triton: out[m, n] = sum_k x[m, k] W[n, k] on any GPU of Triton's, and in its interpreter.

A program makes one tile of 64 BLOCKS rows of W by BM tokens, 64 columns of K at a time: words to weights by shifts, in
the order of w4a16_layout, then one dot with W as the left operand. It is what the faster kernels are compared with, and
what runs where they cannot; nothing here knows a GPU.
"""

import triton
import triton.language as tl

from quantlab_kernels.w4a16_unpack import unpack_plain


@triton.jit
def load_chunk(words, block, chunk, C, BLOCKS: tl.constexpr):
    """Words of 64 BLOCKS rows by 64 columns, or 32 of 8-bit codes: [64 BLOCKS, 16] int16. C: chunks of a row."""
    i = tl.arange(0, BLOCKS * 1024)
    at = words + ((block + i // 1024).to(tl.int64) * C + chunk) * 1024 + i % 1024
    p = tl.reshape(tl.load(at), (BLOCKS, 4, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(p, (0, 1, 5, 2, 4, 3, 6)), (BLOCKS * 64, 16))


@triton.jit
def load_groups(values, block, chunk, n: tl.constexpr, GROUPS, SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """The scale or zero point of each of 64 BLOCKS rows for columns 16 n to 16 n + 15 of a chunk: [64 BLOCKS, 1]."""
    row = tl.arange(0, BLOCKS * 64)
    group = (chunk * 64 + 16 * n) // SIZE
    order = row % 8 * 8 + row // 16 % 4 * 2 + row // 8 % 2
    return tl.load(values + ((block + row // 64) * GROUPS + group) * 64 + order)[:, None]


@triton.jit(do_not_specialize=["M", "C", "scale"])
def w4a16_plain_kernel(x, words, scales, zeros, bias, out, scale, M, N, K, C, BLOCKS: tl.constexpr, BM: tl.constexpr,
                       SIZE: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr,
                       D: tl.constexpr):  # fmt: skip
    """Grid (tiles of 64 BLOCKS rows, tiles of BM tokens). D: what dot multiplies; float32 in the interpreter."""
    NB = (N + 63) // 64
    block = tl.minimum(tl.program_id(0) * BLOCKS, NB - BLOCKS)  # the last tile may cover rows that another has, too
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, 64)
    GROUPS = C * 64 // SIZE
    acc = tl.zeros((BLOCKS * 64, BM), tl.float32)
    chunk = 0
    while chunk < C:  # not range(): the interpreter cannot count to a run-time number with every numpy
        planes = ()
        for n in tl.static_range(4):
            if n * BITS % 16 == 0:
                p = load_chunk(words, block, chunk * (BITS // 4) + n * BITS // 16, C * (BITS // 4), BLOCKS)
            s = load_groups(scales, block, chunk, n, GROUPS, SIZE, BLOCKS)
            z = load_groups(zeros, block, chunk, n, GROUPS, SIZE, BLOCKS) if ZEROS else s
            planes = planes + (unpack_plain(p, n % (16 // BITS), s, z, ZEROS, BITS, D),)  # type: ignore[assignment]
        w = tl.join(tl.join(planes[0], planes[1]), tl.join(planes[2], planes[3]))  # type: ignore[misc]
        w = tl.reshape(tl.permute(w, (0, 3, 2, 1)), (BLOCKS * 64, 64))
        kk = chunk * 64 + k
        keep = (m < M)[None, :] & (kk < K)[:, None]
        xt = tl.load(x + m.to(tl.int64)[None, :] * K + kk[:, None], mask=keep, other=0.0).to(D)
        acc = tl.dot(w, xt, acc)
        chunk += 1
    n = block * 64 + tl.arange(0, BLOCKS * 64)
    acc *= scale
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    keep = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=keep)
