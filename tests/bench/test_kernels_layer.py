"""The bench of one layer: its reference against the model's own decoder block, and what it counts."""

import pytest
import torch
from torch import nn

from quantlab.bench import kernels_layer
from quantlab.bench.gpu_state import State
from quantlab.bench.kernels_attention import Heads, random_cache
from quantlab.bench.kernels_layer import Layer, Row, Step, cache_bytes, exact, line
from quantlab.models.attention import attend_causal
from quantlab.models.layers import RMSNorm
from quantlab.models.rope import rotate
from quantlab_kernels import ref_attention
from quantlab_kernels.kv_cache import Pages, Rope

HEADS, HIDDEN, INTERMEDIATE, TOKENS = Heads(4, 2, 64), 256, 512, 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench's model with few heads and columns."""
    for name, value in (("LLAMA", HEADS), ("HIDDEN", HIDDEN), ("INTERMEDIATE", INTERMEDIATE)):
        monkeypatch.setattr(kernels_layer, name, value)


@pytest.mark.usefixtures("small")
def test_the_reference_is_the_models_own_layer():
    rows = {"qkv": (512, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN)}
    rows["down"] = (HIDDEN, INTERMEDIATE)
    dense = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in rows.items()}
    norms, (x, residual) = torch.rand(2, HIDDEN) + 0.5, torch.randn(2, 1, HIDDEN)
    cache = random_cache(HEADS, 2, torch.zeros(1).half(), int8=False)
    angles = torch.rand(TOKENS, HEADS.dim // 2)
    rope = Rope(angles.cos(), angles.sin(), torch.tensor([TOKENS - 1]))
    pages = Pages(torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([TOKENS], dtype=torch.int32), TOKENS)
    found = exact(x, residual, dense, Layer({}, norms, cache), Step(pages, torch.zeros(1, dtype=torch.int64), rope))

    first, second = (RMSNorm(HIDDEN, kernels_layer.EPS) for _ in range(2))
    first.weight, second.weight = (nn.Parameter(norm, requires_grad=False) for norm in norms)
    summed = x + residual
    q = (first(summed) @ dense["qkv"][: HEADS.query * HEADS.dim].t()).view(1, HEADS.query, 1, HEADS.dim)
    cos, sin = (torch.cat((table[-1:], table[-1:]), -1) for table in (rope.cos, rope.sin))
    q = rotate(q, (cos, sin))
    k, v = (y.transpose(0, 1)[None] for y in ref_attention.read_kv(cache, pages.blocks[0], TOKENS))
    summed = summed + attend_causal(q, k, v, None).view(1, -1) @ dense["o"].t()
    gate, up = (second(summed) @ dense["gate_up"].t()).chunk(2, -1)
    wanted = summed + (nn.functional.silu(gate) * up) @ dense["down"].t()
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(("int8", "wanted"), [(False, 64 * 1024 * 4096), (True, 64 * 1024 * 2112)])
def test_bytes_of_keys_and_values_count_scales(int8: bool, wanted: int):
    assert cache_bytes(64, 1024, int8) == wanted


def test_a_line_says_what_was_measured():
    row = Row(64, 1024, True, 120.04, 58.4, 3.4e-3, {"linears": 70.21}, ["a", "b"], State(1755, 650.0, 60))
    assert line(row) == (
        "layer  64 x 1024 int8 KV:   120.0 us, floor   58.4, error 3.4e-03, 2 launches, 1755 MHz; costs: linears 70.2"
    )
