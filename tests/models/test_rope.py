"""Rotary tables: frequencies of each type against transformers, and what rotation must keep."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantlab.models.config import ModelConfig
from quantlab.models.rope import Rope, attention_scale, block_rope, inverse_frequencies, rotate

SIZES = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
TYPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-betas": YARN | {"beta_fast": 64.0, "beta_slow": 2.0, "truncate": False},
    "yarn-ramp-of-no-width": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def config_with(rope: dict) -> ModelConfig:
    raw = SIZES | {"architectures": ["LlamaForCausalLM"], "rope_parameters": rope}
    return ModelConfig.from_json(raw, "config.json")


@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES.keys())
@pytest.mark.parametrize("length", [100, 200_000])
def test_frequencies_match_transformers(rope, length):
    reference = transformers.LlamaConfig(**SIZES, rope_parameters=dict(rope))
    expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, "cpu", seq_len=length)
    ours = config_with(rope).rope
    torch.testing.assert_close(inverse_frequencies(ours, 128, length), expected, rtol=1e-5, atol=0)
    assert attention_scale(ours) == pytest.approx(scale, rel=1e-12)


def test_default_frequencies_are_powers_of_theta():
    frequencies = inverse_frequencies(config_with({"rope_theta": 10000.0}).rope, 128)
    assert frequencies[0] == 1.0
    assert frequencies[32] == pytest.approx(0.01, rel=1e-6)


def test_dynamic_changes_nothing_within_the_trained_context():
    dynamic, plain = config_with(TYPES["dynamic"]).rope, config_with({"rope_theta": 1e4}).rope
    assert torch.equal(inverse_frequencies(dynamic, 128, 131072), inverse_frequencies(plain, 128))
    assert not torch.equal(inverse_frequencies(dynamic, 128, 131073), inverse_frequencies(plain, 128))


def test_rotated_products_depend_on_distance_alone():
    rope = Rope(config_with({"rope_theta": 1e4}))
    q, k = torch.randn(2, 1, 1, 1, 128, dtype=torch.float32).unbind()

    def product(query_at: int, key_at: int) -> float:
        at = [rope.tables(torch.tensor([position])) for position in (query_at, key_at)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-3)
    assert product(9, 4) != pytest.approx(product(9, 3), abs=1e-3)


def test_tables_of_batched_positions_are_those_of_each_row():
    rope = Rope(config_with(TYPES["llama3"]))
    rows = torch.tensor([[0, 1, 2], [7, 8, 9]])
    cos, sin = rope.tables(rows)
    x = torch.randn(2, 4, 3, 128)
    for row in range(2):
        expected = rotate(x[row : row + 1], rope.tables(rows[row]))
        assert torch.equal(rotate(x, (cos, sin))[row : row + 1], expected)


def test_tables_are_fp32_and_rotation_keeps_the_inputs_dtype():
    tables = Rope(config_with({"rope_theta": 1e4})).tables(torch.arange(3))
    assert {table.dtype for table in tables} == {torch.float32}
    assert rotate(torch.randn(1, 2, 3, 128).bfloat16(), tables).dtype == torch.bfloat16


def test_block_rope_is_none_for_layers_without_rotation():
    config = ModelConfig.from_json(SIZES | {"architectures": ["SmolLM3ForCausalLM"]}, "config.json")
    positions = torch.arange(5)
    cos, _ = block_rope(config, 0, positions, "cpu")
    assert torch.equal(cos, Rope(config).tables(positions)[0])
    assert block_rope(config, 3, positions, "cpu") is None
