"""One decoder layer of an 8B model of Llama 3's shapes on one GPU: a decode step with INT4 weights, in graph replay.

The layers of a graph follow each other as in a model, each with weights and cache of its own, so that all comes from
memory. The result is checked against plain torch in fp32 first; every stage is also left out in turn, and what that
saves is what the stage costs where it stands. Launches are counted by the profiler. Knows nothing about models.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlab.bench.gpu_state import State
from quantlab.bench.gpu_timing import (
    Work,
    copies_to_stay_cold,
    environment,
    graph_times,
    measure_ceilings,
    relative_rmse,
)
from quantlab.bench.kernels_attention import LLAMA, random_cache
from quantlab_kernels import ref_attention, ref_fused
from quantlab_kernels.fused import rms_norm, silu_mul
from quantlab_kernels.kv_cache import KVCache, Pages, Rope, split_qkv, write_kv
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.paged_decode import paged_decode
from quantlab_kernels.ref import dequantize
from quantlab_kernels.w4a16 import w4a16_linear
from quantlab_kernels.w4a16_layout import W4A16Weight, to_kernel

HIDDEN, INTERMEDIATE, EPS = 4096, 14336, 1e-5
SHAPES = {"qkv": (6144, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN),
          "down": (HIDDEN, INTERMEDIATE)}  # fmt: skip
STAGES = ("norms", "write_kv", "attention", "silu_mul", "linears")
# Relative RMSE of the layer's output against fp32; each rounding to bf16 adds 1.6e-3, eight follow each other.
WRONG = 2e-2


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights, norm weights [2, HIDDEN] and the cache of one layer."""

    linears: dict[str, W4A16Weight]
    norms: Tensor
    cache: KVCache


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a decode step share: the pages of its sequences, where the new token goes, its rotation."""

    pages: Pages
    slots: Tensor
    rope: Rope


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds a layer takes at one batch, and what each stage costs; floor: its bytes at the read ceiling."""

    sequences: int
    tokens: int
    int8: bool
    us: float
    floor: float
    error: float
    costs: dict[str, float]
    launches: list[str]
    state: State | None


def forward(x: Tensor, residual: Tensor, layer: Layer, step: Step, without: str = "") -> tuple[Tensor, Tensor]:
    """The layer: x, residual: [S, HIDDEN] -> the next two. A stage left out passes something of its shape on."""
    if without != "norms":
        x, residual = rms_norm(x, layer.norms[0], EPS, residual)
    qkv = _linear(x, layer, "qkv", without)
    q, k, v = split_qkv(qkv, LLAMA.query, LLAMA.kv, LLAMA.dim)
    if without != "write_kv":
        write_kv(layer.cache, q, k, v, step.slots, step.rope)
    x = torch.empty_like(x) if without == "attention" else paged_decode(q, layer.cache, step.pages).view(-1, HIDDEN)
    x = _linear(x, layer, "o", without)
    if without != "norms":
        x, residual = rms_norm(x, layer.norms[1], EPS, residual)
    x = _linear(x, layer, "gate_up", without)
    x = x.view(-1, INTERMEDIATE)[: len(residual)] if without == "silu_mul" else silu_mul(x)
    return _linear(x, layer, "down", without), residual


def _linear(x: Tensor, layer: Layer, name: str, without: str) -> Tensor:
    if without != "linears":
        return w4a16_linear(x, layer.linears[name])
    rows, columns = SHAPES[name]
    return x.new_empty(len(x), rows)


def exact(x: Tensor, residual: Tensor, dense: dict[str, Tensor], layer: Layer, step: Step) -> Tensor:
    """The sum that `forward` ends with, in fp32 throughout save for the cache, which is as it was written."""
    norms = layer.norms.float()
    x, residual = ref_fused.rms_norm(x.float(), norms[0], EPS, residual.float())
    q, _, _ = split_qkv(x @ dense["qkv"].t(), LLAMA.query, LLAMA.kv, LLAMA.dim)
    q = ref_attention.turn(q, step.rope)
    x = ref_attention.paged_decode(q, layer.cache, step.pages).view(-1, HIDDEN)
    x, residual = ref_fused.rms_norm(x @ dense["o"].t(), norms[1], EPS, residual)
    return ref_fused.silu_mul(x @ dense["gate_up"].t()) @ dense["down"].t() + residual


def random_layer(sequences: int, tokens: int, int8: bool) -> tuple[Layer, dict[str, Tensor]]:
    """A layer whose activations stay of order one, and its weights in fp32."""
    linears, dense = {}, {}
    for name, (rows, columns) in SHAPES.items():
        codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, device="cuda")
        scales = ((torch.rand(rows, columns // 128, device="cuda") + 0.5) * 0.2 / columns**0.5).bfloat16()
        quantized = QuantizedWeight(codes, scales, None, 128)
        linears[name], dense[name] = to_kernel(quantized, torch.bfloat16), dequantize(quantized).float()
    norms = torch.rand(2, HIDDEN, device="cuda").add_(0.5).bfloat16()
    blocks = sequences * -(-tokens // LLAMA.block_size)
    return Layer(linears, norms, random_cache(LLAMA, blocks, norms, int8)), dense


def make_step(sequences: int, tokens: int) -> Step:
    """The step that gives each of `sequences` its token number `tokens`; blocks lie in random order."""
    per_sequence = -(-tokens // LLAMA.block_size)
    blocks = torch.randperm(sequences * per_sequence, device="cuda").int().view(sequences, per_sequence)
    lengths = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    last = tokens - 1
    slots = blocks[:, last // LLAMA.block_size].long() * LLAMA.block_size + last % LLAMA.block_size
    frequencies = 5e5 ** (-torch.arange(0, LLAMA.dim, 2, device="cuda") / LLAMA.dim)
    angles = torch.arange(tokens, device="cuda")[:, None] * frequencies
    positions = torch.full((sequences,), last, dtype=torch.int64, device="cuda")
    return Step(Pages(blocks, lengths, tokens, settled=True), slots, Rope(angles.cos(), angles.sin(), positions))


def measure(sequences: int, tokens: int, int8: bool, read_tbs: float, costs: bool = True) -> Row:
    """One row; raises RuntimeError if the layer's output is wrong or differs from run to run."""
    step = make_step(sequences, tokens)
    x, residual = (torch.randn(sequences, HIDDEN, device="cuda").bfloat16() for _ in range(2))
    first, dense = random_layer(sequences, tokens, int8)
    out, summed = forward(x, residual, first, step)
    error = relative_rmse(out.float() + summed.float(), exact(x, residual, dense, first, step))
    again, _ = forward(x, residual, first, step)
    if not error < WRONG or not torch.equal(out, again):
        raise RuntimeError(f"the layer is wrong: relative error {error}, repeats: {torch.equal(out, again)}")
    nbytes = sum(weight.nbytes for weight in first.linears.values()) + cache_bytes(sequences, tokens, int8)
    layers = [first, *(random_layer(sequences, tokens, int8)[0] for _ in range(copies_to_stay_cold(nbytes)))]
    launches = kernels_of(x, residual, first, step)
    names = ("", *(STAGES if costs else ()))
    whole, *rest = graph_times([_work(x, residual, layers, step, name) for name in names])
    stages = {name: whole.median - timing.median for name, timing in zip(names[1:], rest, strict=True)}
    return Row(sequences, tokens, int8, whole.median, nbytes / read_tbs * 1e-6, error, stages, launches, whole.state)


def cache_bytes(sequences: int, tokens: int, int8: bool) -> int:
    """Bytes of keys and values that a step reads."""
    return sequences * tokens * LLAMA.kv * (2 * LLAMA.dim + 8 if int8 else 4 * LLAMA.dim)


def _work(x: Tensor, residual: Tensor, layers: list[Layer], step: Step, without: str) -> Work:
    """The layers one after the other; each takes what the layer before it gave."""
    state = [(x, residual)]

    def enqueue(i: int) -> None:
        state[:] = [forward(*(state[0] if i else (x, residual)), layers[i], step, without)]

    return Work(enqueue, len(layers))


def kernels_of(x: Tensor, residual: Tensor, layer: Layer, step: Step) -> list[str]:
    """The names of the kernels that a layer launches, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward(x, residual, layer, step)
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if str(event.device_type).endswith("CUDA")]


def line(row: Row) -> str:
    """One line of the table."""
    costs = ", ".join(f"{name} {us:.1f}" for name, us in row.costs.items())
    cache = "int8" if row.int8 else "bf16"
    return (
        f"layer {row.sequences:3} x {row.tokens} {cache} KV: {row.us:7.1f} us, floor {row.floor:6.1f}, error "
        f"{row.error:.1e}, {len(row.launches)} launches, {row.state.sm_mhz if row.state else 0} MHz; costs: {costs}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a line a row, and append JSON lines to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=(1, 64))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--no-costs", action="store_true", help="the layer alone, no stage left out")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("this bench needs a GPU")
    torch.manual_seed(0)
    ceilings, facts = measure_ceilings(), environment()
    print({**asdict(ceilings), **facts}, flush=True)
    for sequences in options.sequences:
        for int8 in (False, True):
            row = measure(sequences, options.tokens, int8, ceilings.read_tbs, not options.no_costs)
            torch.cuda.empty_cache()
            print(line(row), flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(json.dumps({"op": "decoder layer", **asdict(row), **facts}) + "\n")


if __name__ == "__main__":
    main()
