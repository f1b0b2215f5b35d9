"""Run as a script under compute-sanitizer: one small case of each attention, fused, sampling and GPTQ kernel.

The tests say whether results are right; here each kernel only has to touch what is its own.
"""

import torch

from quantlab.bench.kernels_attention import Heads, random_cache, scattered_pages
from quantlab_kernels import fused, sampling
from quantlab_kernels.gptq_block import gptq_block
from quantlab_kernels.kv_cache import HeadNorm, Pages, Rope, split_qkv, write_kv
from quantlab_kernels.paged_decode import paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill

DEVICE = torch.device("cuda", 0)
HEADS = Heads(8, 2, 128)
LENGTHS = [40, 1, 300]


def attention(int8: bool) -> None:
    """A step of three sequences, with and without a promise about their pages, and chunks with and without a window."""
    pages, blocks = scattered_pages(LENGTHS, HEADS, DEVICE)
    qkv = torch.randn(len(LENGTHS), 12 * HEADS.dim, device=DEVICE).bfloat16()
    q, k, v = split_qkv(qkv, HEADS.query, HEADS.kv, HEADS.dim)
    cache = random_cache(HEADS, blocks, q, int8)
    slots = [row[(n - 1) // 16].long() * 16 + (n - 1) % 16 for row, n in zip(pages.blocks, LENGTHS, strict=True)]
    turns = torch.rand(2, 512, 64, device=DEVICE)
    rope = Rope(turns[0], turns[1], torch.tensor(LENGTHS, device=DEVICE) - 1)
    ones = torch.ones(HEADS.dim, device=DEVICE).bfloat16()
    write_kv(cache, q, k, v, torch.stack(slots), rope, HeadNorm(ones, ones, 1e-5))
    for settled in (False, True):
        paged_decode(q, cache, Pages(pages.blocks, pages.lengths, 300, settled))
    starts = torch.tensor([0, 30, 31, 231], dtype=torch.int32, device=DEVICE)
    queries = torch.randn(231, HEADS.query, HEADS.dim, device=DEVICE).bfloat16()
    for window in (None, 100):
        paged_prefill(queries, cache, pages, Chunks(starts, 200), window=window)


def between_linears(columns: int) -> None:
    """Norms, SiLU, embeddings."""
    x, residual = (torch.randn(3, columns, device=DEVICE).bfloat16() for _ in range(2))
    weight, gate_up = torch.rand(columns, device=DEVICE).bfloat16(), torch.cat((x, residual), 1)
    fused.rms_norm(x, weight, 1e-5, residual)
    fused.rms_norm_quantized(x, weight, 1e-5, residual, torch.tensor([2], device=DEVICE))
    fused.silu_mul(gate_up)
    fused.silu_mul_quantized(gate_up)
    fused.embed(torch.tensor([1, -1], device=DEVICE), x, torch.tensor([2], device=DEVICE))


def sampler_and_solver() -> None:
    """Two rows of scores; a block of an odd number of columns."""
    probabilities = torch.rand(2, 5120, device=DEVICE).softmax(-1)
    sampling.greatest(probabilities[:, :5001])
    sampling.nucleus_floor(probabilities, torch.tensor([0.5, 0.9], device=DEVICE))
    sampling.race(probabilities.log(), torch.zeros(2, 2, dtype=torch.int32, device=DEVICE))
    w, target, codes, errors = (torch.randn(37, 50, device=DEVICE) for _ in range(4))
    steps, inner = torch.rand(37, 50, device=DEVICE) + 0.1, torch.randn(37, 37, device=DEVICE) * 0.1
    gptq_block(w, target, (steps, None), inner, (codes, errors), (-8, 7))


def main() -> None:
    """Every case."""
    for int8 in (False, True):
        attention(int8)
    for columns in (100, 4096):
        between_linears(columns)
    sampler_and_solver()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
