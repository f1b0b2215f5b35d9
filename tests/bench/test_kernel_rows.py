"""Rows of the kernel benches where there is no GPU: each time of what was measured in turn lands in its own field."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from quantlab.bench import kernels_attention, kernels_w4a16, kernels_w8a8
from quantlab.bench.gpu_state import State
from quantlab.bench.gpu_timing import Ceilings, Timing, Work
from quantlab_kernels.w4a16_tiles import GluonTile
from quantlab_kernels.w8a8_tiles import WgmmaTile

STATE = State(1755, 650.0, 60)
CEILINGS = Ceilings(3.0, 4.0, 700.0)


def in_turn(times: list[float]):
    """What stands for `graph_times`: so many works are expected, and these are their medians."""

    def graph_times(works: list[Work]) -> list[Timing]:
        return [Timing(us, us, us, STATE) for us, _ in zip(times, works, strict=True)]

    return graph_times


def nothing(_: int) -> None:
    """Work that is never enqueued."""


@pytest.mark.parametrize(("tokens", "times"), [(64, [10.0, 8.0, 12.0, 20.0, 15.0]), (8, [10.0, 8.0, 12.0, 20.0])])
def test_a_w8a8_row_has_the_chain_the_product_and_the_baselines(monkeypatch, tokens, times):
    bench = object.__new__(kernels_w8a8.Bench)
    weight = SimpleNamespace(codes=torch.zeros(2, 2, dtype=torch.int8))
    layer = SimpleNamespace(weights=[weight], tokens=lambda count: (torch.zeros(count, 2),) * 4)
    bench.name, bench.ceilings, bench.layer, bench.dense = "qkv", CEILINGS, layer, [torch.zeros(2, 2)]
    for name, value in (
        ("error_of", lambda *_: 1e-3),
        ("work_of", lambda *_, **__: Work(nothing)),
        ("choose_tile", lambda *_: WgmmaTile(8, 2, 128, 1, 1, 1)),
        ("graph_times", in_turn(times)),
    ):
        monkeypatch.setattr(kernels_w8a8, name, value)
    row = bench.row(tokens)
    assert (row.us, row.gemm, row.alone, row.cublas) == (10.0, 8.0, 12.0, 20.0)
    assert row.int_mm == (15.0 if tokens == 64 else None) and row.state == STATE


@pytest.mark.parametrize(("whole", "times"), [(True, [10.0, 20.0, 12.0, 19.0]), (False, [10.0, 20.0])])
def test_a_w4a16_row_of_a_dense_sweep_has_ours_and_cublas_alone(monkeypatch, whole, times):
    bench = object.__new__(kernels_w4a16.Bench)
    dense = torch.zeros(2, 2, dtype=torch.bfloat16)
    weight = SimpleNamespace(nbytes=4_000_000)
    layer = SimpleNamespace(weights=[weight], tokens=lambda count: (torch.zeros(count, 2).bfloat16(), None))
    bench.name, bench.dtype, bench.ceilings, bench.layer = "o", "bf16", CEILINGS, layer
    bench.same = bench.gaussian = [dense]
    for name, value in (
        ("error_of", lambda *_: 1e-3),
        ("work_of", lambda *_, **__: Work(nothing)),
        ("tile_of", lambda *_: GluonTile(8, 1, 256, 16, 2, 0, 1)),
        ("graph_times", in_turn(times)),
    ):
        monkeypatch.setattr(kernels_w4a16, name, value)
    row = bench.row(8, whole)
    assert (row.us, row.cublas, row.alone, row.cublas_same_weights) == (
        10.0,
        20.0,
        *((12.0, 19.0) if whole else (None, None)),
    )
    assert row.floor == pytest.approx((4_000_000 + 2 * 8 * 8192) / 4e6) and row.state == STATE


@pytest.mark.parametrize(
    ("ways", "wanted"),
    [
        ((), (5.0, None, None)),
        ((SDPBackend.FLASH_ATTENTION,), (5.0, None, 7.0)),
        ((SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), (5.0, 7.0, 9.0)),
    ],
)
def test_a_backend_that_does_not_take_a_shape_leaves_its_own_field_empty(monkeypatch, ways, wanted):
    monkeypatch.setattr(kernels_attention, "graph_times", in_turn([5.0, 7.0, 9.0][: len(ways) + 1]))
    found = kernels_attention._timed(Work(nothing), {way: Work(nothing) for way in ways})
    assert found == (*wanted, STATE)
