"""`quantlab inspect` on 16-bit folders; packed ones are inspected where they are made."""

import json
from pathlib import Path
from typing import Any


def test_a_16_bit_model_is_described(cli: Any, books_5m: Path) -> None:
    ran = cli("inspect", books_5m)
    assert (ran.code, ran.err) == (0, "")
    assert "LlamaForCausalLM, 5.25M parameters" in ran.out
    assert "0 of 28 linear modules" in ran.out
    assert "16.000 over the whole model" in ran.out
    assert "sound" in ran.out


def test_json_has_one_row_a_module(cli: Any, books_5m: Path) -> None:
    found = json.loads(cli("inspect", books_5m, "--json").out)
    assert len(found["modules"]) == 28
    assert found["problems"] == []
    first = found["modules"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj"
    assert (first["quantized"], first["bits"], first["bits_per_weight"]) == (False, 16, 16.0)
    assert found["tensor_bytes"] == found["other_bytes"] + sum(row["bytes"] for row in found["modules"])


def test_modules_shows_each_one(cli: Any, books_5m: Path) -> None:
    short, long = cli("inspect", books_5m), cli("inspect", books_5m, "--modules")
    assert "model.layers.3.mlp.down_proj" not in short.out
    assert "model.layers.3.mlp.down_proj" in long.out


def test_unsound_tensors_are_listed_and_exit_4(cli: Any, models: Any, here: Path) -> None:
    models.with_tensor("model.layers.0.self_attn.q_proj.weight", "BF16", (128, 64))
    ran = cli("inspect", "model")
    assert ran.code == 4
    assert len(ran.lines) == 1
    assert "the format is not sound" in ran.lines[0]
    assert "q_proj.weight" in ran.out
    assert json.loads(cli("inspect", "model", "--json").out)["problems"]


def test_output_that_is_piped_is_not_cut(cli: Any, books_5m: Path) -> None:
    assert "…" not in cli("inspect", books_5m, "--modules").out
