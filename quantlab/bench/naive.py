"""GPTQ the way it is commonly done, as a yardstick for time: a Hessian per linear, every block run twice.

Each decoder block runs every calibration sample once with a hook on each linear that collects a Hessian of its own
(q, k and v recompute the same one, so do gate and up), then each linear is solved by Cholesky, inverse and second
Cholesky, column by column in blocks of 128, then every sample runs again with the new weights. Static activation order
and absmax scales, as the common tool's defaults. Nothing is slowed down on purpose; knows nothing about `quant`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantlab.models.attention import DenseAttention
from quantlab.models.decoder import CausalLM
from quantlab.models.layers import DecoderBlock
from quantlab.models.naming import INPUT_GROUPS
from quantlab.models.rope import RopeTables

GROUP_SIZE = 128
BLOCK_SIZE = 128
DAMPING = 0.01
LEVEL_MIN, LEVEL_MAX, HALF_RANGE = -8, 7, 7.5


@dataclass(slots=True)
class Times:
    """Wall seconds of each stage."""

    collect: float = 0.0
    solve: float = 0.0
    propagate: float = 0.0

    @property
    def total(self) -> float:
        """All stages together."""
        return self.collect + self.solve + self.propagate

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the stage `name`."""
        started = time.monotonic()
        yield
        setattr(self, name, getattr(self, name) + time.monotonic() - started)


class Hessian:
    """The running mean of 2 x x^T over the inputs of one linear: [K, K] fp32 (GPTQ, arXiv 2210.17323)."""

    def __init__(self, columns: int):
        self.matrix = torch.zeros(columns, columns)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """One batch of inputs x: [B, T, K]."""
        batch = x.shape[0]
        self.matrix *= self.samples / (self.samples + batch)
        self.samples += batch
        flat = x.flatten(0, 1).float() * (2 / self.samples) ** 0.5
        self.matrix += flat.t() @ flat


def quantize_naively(model: CausalLM, ids: Tensor) -> Times:
    """Replace every block linear of `model` (fp32, CPU) by its dequantized INT4 g128 version, in place.

    ids: [S, T] int64, one calibration sample a row. Returns the seconds of each stage.
    """
    times = Times()
    tables = model.rope.tables(torch.arange(ids.shape[1]))
    with torch.inference_mode():
        states = [model.embed_tokens(row[None]) for row in ids]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, DecoderBlock)
            rope = tables if model.config.uses_rope(layer) else None
            attend = DenseAttention(model.config.layer_window(layer))
            with times.stage("collect"):
                hessians = collect(block, states, rope, attend)
            with times.stage("solve"):
                solve_block(block, hessians)
            with times.stage("propagate"):
                states = [block(x, rope, attend) for x in states]
    return times


def collect(
    block: DecoderBlock, states: list[Tensor], rope: RopeTables | None, attend: DenseAttention
) -> dict[str, Hessian]:
    """Run every sample through `block`; a Hessian for each of its linears, by block-relative name."""
    linears = {name: _linear(block, name) for group in INPUT_GROUPS for name in group}
    hessians = {name: Hessian(linear.weight.shape[1]) for name, linear in linears.items()}
    with hooks(linears, hessians):
        for x in states:
            block(x, rope, attend)
    return hessians


@contextmanager
def hooks(linears: dict[str, nn.Linear], hessians: dict[str, Hessian]) -> Iterator[None]:
    """While open, each linear adds what goes into it to the Hessian of the same name."""

    def watch(name: str) -> RemovableHandle:
        return linears[name].register_forward_pre_hook(lambda _, inputs: hessians[name].add(inputs[0]))

    handles = [watch(name) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def solve_block(block: DecoderBlock, hessians: dict[str, Hessian]) -> None:
    """Quantize each linear of `block` on its own Hessian, in place."""
    for name, hessian in hessians.items():
        linear = _linear(block, name)
        linear.weight.copy_(gptq(linear.weight, hessian.matrix))


def _linear(block: DecoderBlock, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def gptq(weight: Tensor, hessian: Tensor) -> Tensor:
    """The dequantized [N, K] fp32 of `weight` solved on `hessian`: [K, K] fp32 (arXiv 2210.17323, algorithm 1)."""
    scales = weight.unflatten(1, (-1, GROUP_SIZE)).abs().amax(-1) / HALF_RANGE
    scales = scales.bfloat16().float().clamp(min=1e-8)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w, h = weight[:, order].clone(), hessian[order][:, order]
    group_of = order // GROUP_SIZE
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    out = torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, w.shape[1])
        errors = _solve_columns(
            w[:, start:stop], inverse[start:stop, start:stop], scales[:, group_of[start:stop]], out, start
        )
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return out[:, torch.argsort(order)]


def _solve_columns(w: Tensor, inverse: Tensor, scales: Tensor, out: Tensor, start: int) -> Tensor:
    """Round the columns of one block in turn; fills `out`, returns the scaled errors [N, block]."""
    errors = torch.empty_like(w)
    for i in range(w.shape[1]):
        codes = (w[:, i] / scales[:, i]).round().clamp(LEVEL_MIN, LEVEL_MAX)
        out[:, start + i] = codes * scales[:, i]
        errors[:, i] = (w[:, i] - out[:, start + i]) / inverse[i, i]
        w[:, i:] -= errors[:, i : i + 1] * inverse[i : i + 1, i:]
    return errors
