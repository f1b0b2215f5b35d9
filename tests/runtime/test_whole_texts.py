"""Whole texts through the engine's forward pass: the model definition's own states."""

from pathlib import Path

import torch

from quantlab.checkpoint.load import load_model
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.whole_texts import load_whole_texts

TOKENS = 40
IDS = torch.randint(0, 4096, (3, TOKENS), generator=torch.Generator().manual_seed(0))


def plain_states(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder, torch.float32, "cpu").hidden(IDS)


def options(kv_dtype: str = "auto") -> EngineOptions:
    return EngineOptions(device="cpu", dtype="float32", kv_dtype=kv_dtype)  # type: ignore[arg-type]


def error(states: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((states - wanted).norm() / wanted.norm())


def test_states_are_those_of_the_model_definition(books_5m: Path) -> None:
    model, wanted = load_whole_texts(books_5m, options(), texts=3, tokens=TOKENS), plain_states(books_5m)
    assert error(model.states(IDS), wanted) < 1e-5
    assert error(model.states(IDS[1:, :17]), wanted[1:, :17]) < 1e-5


def test_packed_weights_differ_by_the_rounding_of_the_cpu_s_product(int4_model: Path) -> None:
    model = load_whole_texts(int4_model, options(), texts=3, tokens=TOKENS)
    assert error(model.states(IDS), plain_states(int4_model)) < 0.02  # it multiplies in bf16


def test_an_int8_cache_costs_a_little(books_5m: Path) -> None:
    model = load_whole_texts(books_5m, options("int8"), texts=3, tokens=TOKENS)
    assert 1e-4 < error(model.states(IDS), plain_states(books_5m)) < 0.05


def test_logits_are_the_output_layer_s(books_5m: Path) -> None:
    model = load_whole_texts(books_5m, options(), texts=1, tokens=8)
    states = model.states(IDS[:1, :8])[0]
    with torch.inference_mode():
        wanted = load_model(books_5m, torch.float32, "cpu").lm_head(states)
    torch.testing.assert_close(model.logits(states), wanted)
