"""Attention kernels on one GPU: random caches for tests and benches, and rows against SDPA and FlashAttention-3.

Shapes are those of Llama-3-8B: 32 query heads on 8 KV heads of 128 channels, blocks of 16 tokens. Every row is checked
against the fp32 reference before it is timed; caches rotate so that keys and values come from memory, not from the L2.
SDPA reads contiguous keys and values in the same run; FlashAttention-3 is not installable everywhere, so its figures
are constants from another day. Knows nothing about models.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quantlab.bench.gpu_state import State
from quantlab.bench.gpu_timing import (
    Work,
    copies_to_stay_cold,
    environment,
    graph_times,
    measure_ceilings,
    relative_rmse,
)
from quantlab_kernels import ref_attention
from quantlab_kernels.kv_cache import TILE_TOKENS, KVCache, Pages, empty_cache
from quantlab_kernels.paged_decode import paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill
from quantlab_kernels.ref_attention import tile_values, untile_values

# What no kernel may follow: an entry of a block table past the end of its sequence.
NOWHERE = 1 << 30
# FlashAttention-3 as vLLM 0.24.0 ships it, microseconds on an H200 on 2026-11-22 (not in this run): paged decode by
# (sequences, tokens), blocks of 16; causal prefill by (sequences, tokens).
FA3_DECODE = {
    (1, 512): 11.0, (1, 2048): 11.7, (1, 8192): 17.5, (1, 32768): 42.9, (8, 512): 12.4, (8, 2048): 26.3,
    (8, 8192): 71.2, (8, 32768): 255.2, (32, 512): 25.9, (32, 2048): 71.8, (32, 8192): 252.4, (32, 32768): 975.5,
    (64, 512): 46.5, (64, 2048): 136.8, (64, 8192): 490.5, (64, 32768): 1997.0,
}  # fmt: skip
FA3_PREFILL = {(1, 2048): 72.7, (4, 2048): 269.0, (1, 8192): 975.0, (1, 32768): 14793.0}
# (sequences, new tokens, cached tokens before them)
PREFILLS = ((1, 2048, 0), (4, 2048, 0), (1, 4096, 0), (1, 8192, 0), (1, 32768, 0), (1, 2048, 14336), (1, 512, 8192))
BLOCK_SIZES = (16, 128)  # of a prefill's cache
WRONG = 1e-2
WAYS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, KV heads, channels of a head, tokens of a cache block."""

    query: int
    kv: int
    dim: int
    block_size: int = 16


def random_cache(heads: Heads, blocks: int, like: Tensor, int8: bool) -> KVCache:
    """A cache of random keys and values of order one, on like's device and in its dtype (or INT8)."""
    cache = empty_cache(blocks, heads.kv, heads.block_size, heads.dim, like, int8)
    for x in (cache.k, cache.v):
        x.random_(-127, 128) if int8 else x.normal_()
    if cache.scales is not None:
        cache.scales.uniform_(0.5, 1.5).mul_(1 / 64)
    return cache


def scattered_pages(lengths: list[int], heads: Heads, device: torch.device | str, spare: int = 3) -> tuple[Pages, int]:
    """Sequences whose blocks lie in random order among a few that nobody uses, and the number of blocks in all."""
    counts = [-(-length // heads.block_size) for length in lengths]
    total = sum(counts) + spare
    order = torch.randperm(total, device=device).to(torch.int32)
    blocks = torch.full((len(lengths), max(counts, default=0) + 2), NOWHERE, dtype=torch.int32, device=device)
    taken = 0
    for i, count in enumerate(counts):
        blocks[i, :count] = order[taken : taken + count]
        taken += count
    return Pages(blocks, torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths, default=0)), total


def poison_unwritten(cache: KVCache, pages: Pages) -> None:
    """NaN in every slot that holds no token (in its scales, for INT8), as memory that was never written may have."""
    written = torch.zeros(cache.k.shape[0], cache.block_size, dtype=torch.bool, device=cache.k.device)
    for row, length in zip(pages.blocks, pages.lengths.tolist(), strict=True):
        used = row[: -(-length // cache.block_size)].long()
        here = torch.arange(used.numel() * cache.block_size, device=row.device) < length
        written[used] = here.view(-1, cache.block_size)
    if cache.scales is None:
        for x in (cache.k, cache.v):
            x.masked_fill_(~written[:, None, :, None], float("nan"))
    else:
        cache.scales.masked_fill_(~written.view(-1, 1, cache.block_size // TILE_TOKENS, 1, TILE_TOKENS), float("nan"))
        # Codes have no NaN; their largest values stand for garbage.
        cache.k.masked_fill_(~written[:, None, :, None], -128)
        values = untile_values(cache.v).masked_fill_(~written[:, None, :, None], -128)
        cache.v.copy_(tile_values(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One shape: microseconds of ours, of the baselines in this run, and of FA3 another day; the error beside them.

    rate: TB/s of cache bytes read in decode, TFLOP/s in prefill.
    """

    what: str
    sequences: int
    tokens: int
    cached: int
    int8: bool
    us: float
    rate: float
    error: float
    sdpa_cudnn: float | None
    sdpa_flash: float | None
    fa3: float | None
    block_size: int
    state: State | None


LLAMA = Heads(32, 8, 128)


def decode_row(sequences: int, tokens: int, int8: bool, baselines: bool) -> Row:
    """Paged decode of `sequences` queries over `tokens` each; raises RuntimeError if the result is wrong."""
    nbytes = sequences * tokens * LLAMA.kv * (2 * LLAMA.dim + 8 if int8 else 4 * LLAMA.dim)
    copies = copies_to_stay_cold(nbytes)
    q = torch.randn(sequences, LLAMA.query, LLAMA.dim, device="cuda", dtype=torch.bfloat16)
    per_copy = sequences * -(-tokens // LLAMA.block_size)
    cache = random_cache(LLAMA, per_copy * copies, q, int8)
    order = torch.randperm(per_copy * copies, device="cuda").to(torch.int32).view(copies, sequences, -1)
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    pages = [Pages(blocks.contiguous(), lengths, tokens) for blocks in order]
    first = Pages(pages[0].blocks[:1].contiguous(), lengths[:1], tokens)
    out = torch.full_like(q, float("nan"))
    paged_decode(q, cache, pages[0], out=out)
    error = _checked(out, out[:1], ref_attention.paged_decode(q[:1].float(), cache, first))
    launches = max(2, min(48, int(3000 / (nbytes / 4e6 + 5))))
    work = Work(lambda i: paged_decode(q, cache, pages[i], out=out), copies, launches)
    shape = (copies, sequences, LLAMA.kv, tokens, LLAMA.dim)
    us, cudnn, flash, state = _timed(work, _baselines(q[:, :, None], shape, launches, False) if baselines else {})
    fa3 = FA3_DECODE.get((sequences, tokens))
    rate = nbytes / us * 1e-6
    return Row("decode", sequences, 1, tokens, int8, us, rate, error, cudnn, flash, fa3, LLAMA.block_size, state)


def prefill_row(sequences: int, tokens: int, cached: int, int8: bool, block_size: int) -> Row:
    """Causal prefill of chunks of `tokens` behind `cached` ones; raises RuntimeError if the result is wrong."""
    length, heads = cached + tokens, replace(LLAMA, block_size=block_size)
    q = torch.randn(sequences * tokens, LLAMA.query, LLAMA.dim, device="cuda", dtype=torch.bfloat16)
    pages, blocks = scattered_pages([length] * sequences, heads, "cuda")
    cache = random_cache(heads, blocks, q, int8)
    starts = torch.arange(0, len(q) + 1, tokens, dtype=torch.int32, device="cuda")
    out = torch.full_like(q, float("nan"))
    run = partial(paged_prefill, q, cache, pages, Chunks(starts, tokens), out=out)
    run()
    some = torch.randint(0, tokens, (48,), device="cuda")
    k, v = ref_attention.read_kv(cache, pages.blocks[-1], length)
    rows = len(q) - tokens + some
    exact = ref_attention.attend(q[rows], k, v, cached + some, LLAMA.dim**-0.5, None)
    error = _checked(out, out[rows], exact)
    flops = 4 * sequences * LLAMA.query * LLAMA.dim * tokens * ((tokens + 1) / 2 + cached)
    launches = max(1, min(16, int(4000 / (flops / 400e6))))
    split = q.view(sequences, tokens, LLAMA.query, LLAMA.dim).transpose(1, 2)
    shape = (1, sequences, LLAMA.kv, tokens, LLAMA.dim)
    beside = {} if cached or int8 else _baselines(split, shape, launches, True)
    us, cudnn, flash, state = _timed(Work(lambda _: run(), 1, launches), beside)
    fa3, rate = None if cached else FA3_PREFILL.get((sequences, tokens)), flops / us * 1e-6
    return Row("prefill", sequences, tokens, cached, int8, us, rate, error, cudnn, flash, fa3, block_size, state)


def _checked(out: Tensor, part: Tensor, exact: Tensor) -> float:
    """The error of `part`, after which all of `out` is known to have been written."""
    error = relative_rmse(part, exact)
    if not error < WRONG or not torch.isfinite(out).all():
        raise RuntimeError(f"attention is wrong: relative error {error}")
    return error


def _baselines(q: Tensor, shape: Sequence[int], launches: int, causal: bool) -> dict[SDPBackend, Work]:
    """SDPA over contiguous keys and values of `shape` [copies, S, KV heads, T, D], by those of WAYS that take it."""
    k, v = (torch.empty(shape, device="cuda", dtype=q.dtype).normal_() for _ in range(2))
    attend = partial(scaled_dot_product_attention, is_causal=causal, enable_gqa=True)

    def enqueue(way: SDPBackend, i: int) -> None:
        with sdpa_kernel(way):
            attend(q, k[i], v[i])

    return {way: Work(partial(enqueue, way), len(k), launches) for way in WAYS if _runs(partial(enqueue, way, 0))}


def _runs(work: Callable[[], object]) -> bool:
    try:
        work()
    except RuntimeError:
        return False
    return True


def _timed(ours: Work, baselines: dict[SDPBackend, Work]) -> tuple[float, float | None, float | None, State | None]:
    """Microseconds of ours and of WAYS, None for what is not among `baselines`, and the GPU's state."""
    first, *rest = graph_times([ours, *baselines.values()])
    times = dict(zip(baselines, (timing.median for timing in rest), strict=True))
    cudnn, flash = (times.get(way) for way in WAYS)
    return first.median, cudnn, flash, first.state


def line(row: Row) -> str:
    """A row for people."""
    kind = f"{'int8' if row.int8 else 'bf16'} blocks of {row.block_size}"
    name = f"{row.what} {row.sequences}x{row.tokens} + {row.cached} {kind}"
    rest = "  ".join(
        f"{key} {value:.1f} ({value / row.us:.2f}x)"
        for key, value in (("cuDNN", row.sdpa_cudnn), ("flash", row.sdpa_flash), ("FA3 another day", row.fa3))
        if value is not None
    )
    return f"{name:46} {row.us:9.1f} us {row.rate:7.2f}  error {row.error:.1e}  {rest}"


def main(words: Sequence[str] | None = None) -> None:
    """Measure every row, print it, and append JSON lines to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=(1, 8, 32, 64))
    parser.add_argument("--contexts", type=int, nargs="+", default=(512, 2048, 8192, 32768))
    parser.add_argument("--what", nargs="+", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES, help="of a prefill's cache")
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True, help="SDPA beside decode")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("these benches need a GPU")
    facts = {"ceilings": asdict(measure_ceilings()), **environment()}
    _emit(facts, json.dumps(facts), options.out)
    jobs: list[Callable[[], Row]] = []
    if "prefill" in options.what:
        jobs += [partial(prefill_row, *shape, False, size) for shape in PREFILLS for size in options.block_sizes]
        jobs += [partial(prefill_row, 1, 8192, 0, True, 16)]
    if "decode" in options.what:
        shapes = [(s, c) for c in options.contexts for s in options.sequences]
        jobs += [partial(decode_row, *shape, int8, options.baselines and not int8) for shape in shapes
                 for int8 in (False, True)]  # fmt: skip
    for job in jobs:
        row = job()
        torch.cuda.empty_cache()
        _emit(asdict(row), line(row), options.out)


def _emit(fields: dict, text: str, path: Path | None) -> None:
    print(text, flush=True)
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(fields) + "\n")


if __name__ == "__main__":
    main()
