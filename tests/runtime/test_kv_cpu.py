"""The CPU's cache: what lies behind a sequence's end, or in blocks that a table once named, is nobody's business."""

from pathlib import Path

import pytest
import torch

from quantlab.runtime.build import build_engine
from quantlab.runtime.kv_cpu import places_of
from quantlab.runtime.options import EngineOptions, KVDtype
from quantlab.runtime.request import Request, SamplingParams


def test_places_follow_the_table_and_repeat_the_last_token() -> None:
    tables = torch.tensor([[5, 2, 9], [7, 0, 0]], dtype=torch.int32)
    places = places_of(tables, torch.tensor([6, 3], dtype=torch.int32), block_size=4)
    assert places.tolist() == [[20, 21, 22, 23, 8, 9], [28, 29, 30, 30, 30, 30]]


def texts(folder: Path, kv_dtype: KVDtype, garbage: float) -> list[int | str | None]:
    """What three prompts of different lengths give when all blocks held `garbage` before."""
    engine = build_engine(folder, EngineOptions("cpu", kv_dtype=kv_dtype, kv_memory=1 << 22))
    for cache in engine._runner.operations._caches:  # type: ignore[attr-defined]
        for pool in cache.scales or (cache.keys, cache.values):
            pool.fill_(garbage)
    for length in (5, 40, 17):
        params = SamplingParams(max_tokens=6, temperature=0)
        engine.add(Request(str(length), tuple(range(100, 100 + length)), params))
    told: list[int | str | None] = []
    while engine.has_work:
        for event in engine.step():
            told += [*event.token_ids, event.error]
    return told


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_wrong_numbers_left_behind_by_others_reach_nobody(books_5m: Path, kv_dtype: KVDtype) -> None:
    clean = texts(books_5m, kv_dtype, garbage=0.0)
    assert set(clean) > {None}
    assert texts(books_5m, kv_dtype, garbage=float("nan")) == clean
