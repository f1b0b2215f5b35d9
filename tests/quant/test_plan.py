"""Schemes by module, and a plan from headers alone: exact sizes, named problems, no weights read."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantlab.checkpoint.hf import open_checkpoint
from quantlab.checkpoint.sizes import disk_entries, entry_bytes
from quantlab.errors import CheckpointError, RecipeError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import linear_shapes, tensor_shapes
from quantlab.quant.options import CalibrationSpec, QuantizeOptions
from quantlab.quant.plan import Plan, assign, assign_schemes, make_plan, scheme_of
from quantlab.recipe import Recipe
from quantlab.recipe_file import builtin, for_quality
from quantlab.schemes import Scheme, describe

INT4 = Scheme("w4a16", 128)
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_70B: dict[str, Any] = {
    **SMALL,
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def config_of(**changes: Any) -> ModelConfig:
    """A small model."""
    return ModelConfig.from_json({**SMALL, **changes}, "test")


def recipe_of(**keys: Any) -> Recipe:
    """A round-to-nearest recipe with some keys set."""
    return Recipe.model_validate({"passes": [{"pass": "rtn"}], **keys})


def sparse_checkpoint(folder: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint whose weight file has a full header and holes for data."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensor_shapes(ModelConfig.from_json(raw, "test")).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def plan_of(folder: Path, recipe: Recipe, shard: int = 5 * 10**9) -> Plan:
    """The plan for a folder."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_json(checkpoint.config, "test")
    options = QuantizeOptions(folder, folder.parent / "out", recipe, max_shard_size=shard)
    return make_plan(checkpoint, config, recipe, options)


def test_everything_but_the_head_is_quantized_by_default() -> None:
    schemes = assign_schemes(recipe_of(), config_of())
    assert schemes.pop("lm_head") is None
    assert set(schemes.values()) == {INT4}
    assert len(schemes) == 14


def test_order_is_the_models() -> None:
    config = config_of()
    assert list(assign_schemes(recipe_of(), config)) == list(linear_shapes(config))


def test_reasons_are_told_for_what_is_skipped() -> None:
    overrides = [{"match": "re:.*o_proj", "scheme": "skip"}]
    skipped = assign(recipe_of(ignore=["lm_head", "re:.*down_proj"], overrides=overrides), config_of()).skipped
    assert skipped["lm_head"] == "ignored by 'lm_head'"
    assert skipped["model.layers.1.mlp.down_proj"] == "ignored by 're:.*down_proj'"
    assert skipped["model.layers.0.self_attn.o_proj"] == "override 're:.*o_proj' says skip"
    assert len(skipped) == 5


def test_a_tied_head_is_skipped_because_it_is_the_embedding() -> None:
    assignment = assign(recipe_of(), config_of(tie_word_embeddings=True))
    assert "lm_head" not in assignment.schemes
    assert assignment.skipped == {"lm_head": "shares its weight with the embedding"}
    assert assignment.problems == ()


def test_the_first_matching_override_wins_over_ignore_and_scheme() -> None:
    overrides = [
        {"match": "model.layers.0.mlp.down_proj", "scheme": "w8a16", "group_size": "channel"},
        {"match": "re:.*down_proj", "scheme": "w4a16", "group_size": 32, "symmetric": False},
        {"match": "lm_head", "scheme": "w8a16"},
    ]
    schemes = assign_schemes(recipe_of(overrides=overrides), config_of())
    assert schemes["model.layers.0.mlp.down_proj"] == Scheme("w8a16", None)
    assert schemes["model.layers.1.mlp.down_proj"] == Scheme("w4a16", 32, False)
    assert schemes["lm_head"] == Scheme("w8a16", 128)


def test_w8a8_has_one_scale_per_channel_whatever_the_group_size() -> None:
    assert scheme_of(recipe_of(scheme="w8a8")) == Scheme("w8a8", None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ignore": ["lm_haed"]}, "ignore: 'lm_haed' matches no module, did you mean 'lm_head'?"),
        ({"ignore": ["re:.*router"]}, "ignore: 're:.*router' matches no module"),
        ({"overrides": [{"match": "re:(", "scheme": "skip"}]}, "override 1: 're:(' is not a regular expression"),
        ({"ignore": ["re:.*"]}, "nothing is left to quantize"),
        (
            {
                "overrides": [
                    {"match": "re:.*down_proj", "scheme": "skip"},
                    {"match": "re:.*0.*down_proj", "scheme": "skip"},
                ]
            },
            "override 2 ('re:.*0.*down_proj') is never reached",
        ),
        (
            {"overrides": [{"match": "model.layers.1.self_attn.q_proj", "scheme": "w8a16"}]},
            "model.layers.1.self_attn: engines fuse these, so they must share one scheme: "
            "q_proj w8a16 g128, k_proj w4a16 g128, v_proj w4a16 g128",
        ),
        ({"ignore": ["lm_head", "model.layers.0.mlp.up_proj"]}, "gate_proj w4a16 g128, up_proj 16-bit"),
    ],
)
def test_problems_are_named(keys: dict[str, Any], message: str) -> None:
    problems = assign(recipe_of(**keys), config_of()).problems
    assert any(message in problem for problem in problems)
    with pytest.raises(RecipeError):
        assign_schemes(recipe_of(**keys), config_of())


def test_a_tied_head_cannot_be_quantized() -> None:
    recipe = recipe_of(overrides=[{"match": "lm_head", "scheme": "w8a16"}])
    assert "so it cannot be quantized" in assign(recipe, config_of(tie_word_embeddings=True)).problems[0]


def test_indivisible_modules_are_told_once_a_size_with_what_fits() -> None:
    config = config_of(hidden_size=192, intermediate_size=344, num_attention_heads=6)
    first, second = assign(recipe_of(), config).problems
    assert first.startswith("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj (12 modules): 192 input features")
    assert "group sizes that fit: 64, 32, channel" in first
    assert second.startswith("down_proj (2 modules): 344 input features")
    assert "group sizes that fit: channel" in second
    assert r"'re:.*\.down_proj'" in second


def test_the_advice_for_an_indivisible_module_works() -> None:
    config = config_of(intermediate_size=344)
    assert assign(recipe_of(), config).problems
    fixed = recipe_of(overrides=[{"match": r"re:.*\.down_proj", "scheme": "w4a16", "group_size": "channel"}])
    assert assign(fixed, config).problems == ()
    assert assign(recipe_of(ignore=["lm_head", r"re:.*\.down_proj"]), config).problems == ()


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (None, "16-bit"),
        (INT4, "w4a16 g128"),
        (Scheme("w4a16", None, False), "w4a16 channel asym"),
        (Scheme("w8a8", None), "w8a8"),
    ],
)
def test_describe_is_short(scheme: Scheme | None, text: str) -> None:
    assert describe(scheme) == text


def test_plan_counts_every_byte_of_the_shipped_model(books_5m: Path) -> None:
    plan = plan_of(books_5m, builtin("w4a16-balanced"))
    files = dict(plan.files)
    assert files["tokenizer.json"] == (books_5m / "tokenizer.json").stat().st_size
    assert {"model.safetensors", "config.json"} <= files.keys()
    assert plan.output_bytes == sum(files.values())
    assert 4.125 <= plan.bits_per_weight < 4.13
    assert plan.problems == ()
    for module in plan.modules:
        if module.scheme:
            assert module.bytes == sum(map(entry_bytes, disk_entries(module.name, module.shape, module.scheme, "BF16")))


def test_plan_cuts_shards_and_counts_their_index(books_5m: Path) -> None:
    whole = plan_of(books_5m, builtin("w4a16-rtn"))
    cut = plan_of(books_5m, builtin("w4a16-rtn"), shard=1_000_000)
    names = [name for name, _ in cut.files if name.startswith("model-")]
    assert len(names) >= 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert "model.safetensors.index.json" in dict(cut.files)
    assert cut.output_bytes > whole.output_bytes


def test_plan_with_problems_has_no_sizes(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "odd", {**SMALL, "intermediate_size": 344})
    plan = plan_of(folder, builtin("w4a16-fast"))
    assert plan.problems
    assert plan.files == ()


def test_plan_refuses_tensors_of_another_model(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "other", SMALL)
    (folder / "config.json").write_text(json.dumps({**SMALL, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="is missing"):
        plan_of(folder, builtin("w4a16-fast"))


def test_70b_is_planned_in_two_seconds_without_reading_weights(tmp_path: Path) -> None:
    folder = sparse_checkpoint(tmp_path / "70b", LLAMA_70B)
    started = time.monotonic()
    plan = plan_of(folder, builtin("w4a16-balanced"))
    assert time.monotonic() - started < 2.0
    assert 70e9 < plan.parameters < 71e9
    linear = sum(math.prod(module.shape) for module in plan.modules if module.scheme)
    rest = plan.parameters - linear
    expected = linear * 4.125 / 8 + rest * 2
    assert plan.output_bytes == pytest.approx(expected, rel=1e-5)
    assert len([name for name, _ in plan.files if name.startswith("model-")]) == math.ceil(expected / 5e9)


def test_more_calibration_needs_more_memory_and_time(books_5m: Path) -> None:
    checkpoint = open_checkpoint(books_5m)
    config = ModelConfig.from_json(checkpoint.config, "test")
    recipe = builtin("w4a16-balanced")
    few = QuantizeOptions(books_5m, Path("out"), recipe, CalibrationSpec(samples=8))
    many = replace(few, calibration=CalibrationSpec(samples=64))
    small, large = (make_plan(checkpoint, config, recipe, options) for options in (few, many))
    assert (small.tokens, large.tokens) == (8 * 1024, 64 * 1024)
    assert small.peak_bytes < large.peak_bytes
    assert small.seconds < large.seconds


def test_distillation_holds_the_whole_model(books_5m: Path) -> None:
    balanced = plan_of(books_5m, for_quality("w4a16", "balanced"))
    best = plan_of(books_5m, for_quality("w4a16", "best"))
    assert any("whole model" in item.what for item in best.memory)
    assert best.peak_bytes >= balanced.peak_bytes
    assert best.seconds > balanced.seconds
