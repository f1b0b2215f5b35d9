"""The shipped model quantized for real: never worse than plain rounding, and outlier channels that INT8 survives."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.load import load_model
from quantlab.eval.perplexity import perplexity, read_ids
from quantlab.models.naming import block_prefix
from quantlab.quant.options import CalibrationSpec, QuantizeOptions
from quantlab.quant.run import quantize_checkpoint
from quantlab.recipe import Recipe
from quantlab.recipe_file import builtin

TOKENS, WINDOW = 8192, 512
BEHIND = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def run(source: Path, out: Path, recipe: Recipe, samples: int = 16, seq_len: int = 512) -> dict[str, Any]:
    """Quantize on the bundled text; returns the report."""
    spec = CalibrationSpec(samples=samples, seq_len=seq_len)
    quantize_checkpoint(QuantizeOptions(source, out, recipe, spec, device="cpu"), lambda event: None)
    return json.loads((out / "quantlab_report.json").read_text())


def add_outliers(source: Path, target: Path, share: float = 0.01, factor: float = 30.0) -> Path:
    """A copy of `source` that computes the same function: `share` of the channels of each block's norms multiplied by
    `factor`, the matching input columns of the linears behind them divided by it, all in float32."""
    shutil.copytree(source, target)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    draw = torch.Generator().manual_seed(0)
    for layer in range(config["num_hidden_layers"]):
        for norm, linears in BEHIND.items():
            weight = tensors[f"{block_prefix(layer)}{norm}.weight"]
            channels = torch.randperm(len(weight), generator=draw)[: max(1, round(share * len(weight)))]
            weight[channels] *= factor
            for linear in linears:
                tensors[f"{block_prefix(layer)}{linear}.weight"][:, channels] /= factor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    return target


@pytest.fixture(scope="module")
def ids(evaluation_text: Path, books_tokenizer: Any) -> torch.Tensor:
    """The first tokens of the shipped held-out text."""
    return read_ids([evaluation_text], books_tokenizer, TOKENS)


def measured(folder: Path, ids: torch.Tensor) -> float:
    return perplexity(load_model(folder, torch.float32, "cpu"), ids, WINDOW)


@pytest.mark.parametrize("name", ["w4a16-fast", "w4a16-balanced", "w4a16-awq", "w8a8-balanced", "w8a16-balanced"])
def test_no_module_of_a_real_run_is_worse_than_plain_rounding(name: str, books_5m: Path, tmp_path: Path) -> None:
    report = run(books_5m, tmp_path / "out", builtin(name), samples=4, seq_len=256)
    assert len(report["modules"]) == 28
    assert report["worse_than_rtn"] == []
    assert all(0 < row["error"] <= row["rtn_error"] for row in report["modules"])


def test_balanced_closes_most_of_the_gap_that_plain_rounding_leaves(
    books_5m: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    exact = measured(books_5m, ids)
    found = {}
    for name in ("w4a16-rtn", "w4a16-balanced"):
        run(books_5m, tmp_path / name, builtin(name))
        found[name] = measured(tmp_path / name, ids)
    rtn, balanced = found["w4a16-rtn"], found["w4a16-balanced"]
    assert exact < balanced < rtn
    assert (rtn - balanced) / (rtn - exact) > 0.4


@pytest.fixture(scope="module")
def spiky(books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with outlier channels in front of every linear behind a norm."""
    return add_outliers(books_5m, tmp_path_factory.mktemp("spiky") / "model")


def test_the_outliers_do_not_change_the_function(spiky: Path, books_5m: Path, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        ours, theirs = (load_model(folder, torch.float32, "cpu")(ids[None, :256]) for folder in (spiky, books_5m))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_outliers_break_plain_int8_and_not_the_default_recipe(
    spiky: Path, books_5m: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    exact = measured(books_5m, ids)
    ratios = {}
    for name in ("w8a8-rtn", "w8a8-balanced"):
        run(spiky, tmp_path / name, builtin(name))
        ratios[name] = measured(tmp_path / name, ids) / exact
    assert ratios["w8a8-rtn"] > 1.03
    assert ratios["w8a8-balanced"] < 1.005
