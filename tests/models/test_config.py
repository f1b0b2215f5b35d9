"""Reading config.json: family defaults as in transformers, old and new keys, refusals that name the key."""

import json
import subprocess
import sys
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import CheckpointError, QuantlabError, UnsupportedModel
from quantlab.models.config import FAMILIES, ModelConfig

REQUIRED = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_json(raw, "model/config.json")


def llama(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"]} | REQUIRED | changes


@pytest.mark.parametrize("architecture", FAMILIES)
def test_missing_keys_mean_what_they_mean_in_transformers(architecture):
    model_type = FAMILIES[architecture].model_type
    # Token ids are left out: the defaults of some families lie beyond this small vocabulary.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    complete = transformers.AutoConfig.for_model(model_type, **REQUIRED, **ids).to_dict()
    assert read({"architectures": [architecture]} | REQUIRED) == read(complete | {"architectures": [architecture]})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_missing_architectures_fall_back_to_the_model_type(architecture):
    config = read(REQUIRED | {"model_type": FAMILIES[architecture].model_type})
    assert config.architecture == architecture


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 100},
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 100},
        ),
    ],
)
def test_old_rope_keys_read_as_the_new_ones(old, new):
    newer = {key: value for key, value in old.items() if key == "max_position_embeddings"} | {"rope_parameters": new}
    assert read(llama(**old)).rope == read(llama(**newer)).rope


def test_rope_scaling_wins_over_rope_parameters_as_in_transformers():
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    reference = transformers.LlamaConfig(**REQUIRED, **both).rope_parameters
    rope = read(llama(**both)).rope
    assert (rope.type, rope.factor, rope.theta) == ("linear", 2.0, reference["rope_theta"])
    assert reference["rope_type"] == "linear"


def test_top_level_trained_context_wins_as_in_transformers():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    raw = llama(original_max_position_embeddings=1024, max_position_embeddings=4096, rope_parameters=scaling)
    assert read(raw).rope.max_position == 1024


def test_bundled_style_config_is_read_whole():
    raw = llama(head_dim=64, num_key_value_heads=8, dtype="bfloat16", tie_word_embeddings=True, rms_norm_eps=1e-5)
    config = read(raw | {"bos_token_id": 1, "eos_token_id": [2, 3], "quantization_config": {"any": "thing"}})
    assert (config.head_dim, config.num_kv_heads, config.dtype) == (64, 8, "bfloat16")
    assert (config.tie_word_embeddings, config.rms_norm_eps) == (True, 1e-5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))


def test_older_dtype_key_and_absent_dtype():
    assert read(llama(torch_dtype="float16")).dtype == "float16"
    assert read(llama()).dtype == "float32"


def test_token_ids_outside_the_vocabulary_are_dropped():
    config = read(llama(bos_token_id=-1, eos_token_id=[2, 999999]))
    assert (config.bos_token_id, config.eos_token_ids) == (None, (2,))


def test_null_kv_heads_mean_one_for_each_head():
    raw = {"architectures": ["MistralForCausalLM"]} | REQUIRED
    assert read(raw).num_kv_heads == 8
    assert read(raw | {"num_key_value_heads": None}).num_kv_heads == 32


def test_windows_start_at_max_window_layers():
    raw = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 16} | REQUIRED
    config = read(raw | {"max_window_layers": 30})
    assert [config.layer_window(i) for i in (0, 29, 30, 39)] == [None, None, 16, 16]


def test_window_is_off_unless_the_family_turns_it_on():
    assert read(llama(sliding_window=16)).windows == (None,) * 40
    qwen = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 16} | REQUIRED
    assert read(qwen).windows == (None,) * 40
    mistral = {"architectures": ["MistralForCausalLM"]} | REQUIRED
    assert read(mistral).windows == (4096,) * 40


def test_every_fourth_smollm3_layer_has_no_rope():
    config = read({"architectures": ["SmolLM3ForCausalLM"]} | REQUIRED)
    assert [i for i in range(40) if not config.uses_rope(i)] == list(range(3, 40, 4))


UNSUPPORTED = {
    "other architecture": ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM is not supported; supported"),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}, "is not supported"),
    "architecture is no string": ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    "rope type": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope' is not supported"),
    "rope by layer type": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "layer types": ({"layer_types": ["sliding_attention"] * 40}, "layer_types"),
}


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unknown_kinds_are_refused_by_name(change, message):
    with pytest.raises(UnsupportedModel, match=message.replace("(", r"\(")) as refusal:
        read(llama(**change))
    assert refusal.value.where == "model/config.json"


BAD_VALUES = {
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "negative size": ({"vocab_size": -1}, "vocab_size must be a whole number from 1"),
    "text for a number": ({"num_hidden_layers": "12"}, "num_hidden_layers must be a whole number"),
    "boolean for a number": ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
    "fraction": ({"intermediate_size": 1.5}, "intermediate_size must be a whole number"),
    "huge layer count": ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 4096"),
    "not-a-number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
    "infinity": ({"rope_theta": float("inf")}, "rope_theta must be a number"),
    "flag as number": ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    "heads and kv heads": ({"num_key_value_heads": 5}, "not a multiple of num_key_value_heads 5"),
    "heads and hidden size": ({"num_attention_heads": 24}, "not a multiple of num_attention_heads 24"),
    "odd head size": ({"head_dim": 9}, "head_dim 9 must be even"),
    "rope not an object": ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "rope factor below one": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be a number from 1"),
    "llama3 bands": ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1 must be above"),
    "layer types too short": ({"layer_types": ["full_attention"]}, "layer_types must name each of 40 layers"),
    "token id is text": ({"eos_token_id": ["</s>"]}, "eos_token_id must be token ids"),
}


@pytest.mark.parametrize(("change", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_refused_by_key(change, message):
    with pytest.raises(CheckpointError, match=message) as refusal:
        read(llama(**change))
    assert refusal.value.where == "model/config.json"


def test_short_list_of_nope_layers_is_refused():
    with pytest.raises(CheckpointError, match="no_rope_layers must hold a 0 or 1 for each of 40 layers"):
        read({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]} | REQUIRED)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted(
    transformers.AutoConfig.for_model("smollm3").to_dict()
    | llama(rope_scaling=0, rope_theta=0, dtype=0, head_dim=0, max_window_layers=0, partial_rotary_factor=0)
)


@given(architecture=st.sampled_from(sorted(FAMILIES)), key=st.sampled_from(KEYS), value=JUNK)
def test_junk_in_any_key_is_read_or_refused_in_one_line(architecture, key, value):
    flags = {"use_sliding_window": True, "sliding_window": 8, "num_key_value_heads": 8}
    try:
        config = read({"architectures": [architecture]} | REQUIRED | flags | {key: value})
    except QuantlabError as refusal:
        assert len(refusal.one_line()) < 400
    else:
        assert len(config.windows) == len(config.rope_layers) == config.num_layers


def test_reading_a_config_imports_no_torch():
    raw = json.dumps(llama())
    code = (
        "import json, sys\n"
        "from quantlab.models.config import ModelConfig\n"
        "from quantlab.models.naming import tensor_shapes\n"
        f"tensor_shapes(ModelConfig.from_json(json.loads({raw!r}), 'x'))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'yaml'} & sys.modules.keys()))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
