"""Tensor names and shapes: equal to what transformers saves, and to published parameter counts."""

import json
from math import prod
from typing import Any

import pytest
from safetensors import safe_open

from quantlab.models.config import ModelConfig
from quantlab.models.naming import INPUT_GROUPS, block_linear_shapes, block_prefix, linear_shapes, tensor_shapes


def published(architecture: str, sizes: tuple[int, ...], **flags: Any) -> ModelConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    raw = dict(zip(names + heads, sizes, strict=True)) | {"architectures": [architecture]} | flags
    return ModelConfig.from_json(raw, "config.json")


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (published("LlamaForCausalLM", (32000, 4096, 11008, 32, 32, 32)), 6_738_415_616),
        (published("LlamaForCausalLM", (128256, 4096, 14336, 32, 32, 8)), 8_030_261_248),
        (
            published("LlamaForCausalLM", (128256, 2048, 8192, 16, 32, 8), head_dim=64, tie_word_embeddings=True),
            1_235_814_400,
        ),
        (published("LlamaForCausalLM", (49152, 576, 1536, 30, 9, 3), tie_word_embeddings=True), 134_515_008),
        (published("MistralForCausalLM", (32000, 4096, 14336, 32, 32, 8)), 7_241_732_096),
        (published("Qwen2ForCausalLM", (151936, 896, 4864, 24, 14, 2), tie_word_embeddings=True), 494_032_768),
        (published("Qwen3ForCausalLM", (151936, 1024, 3072, 28, 16, 8), tie_word_embeddings=True), 596_049_920),
        (published("SmolLM3ForCausalLM", (128256, 2048, 11008, 36, 16, 4)), 3_075_098_624),
    ],
    ids=[
        "Llama-2-7B", "Llama-3.1-8B", "Llama-3.2-1B", "SmolLM2-135M", "Mistral-7B", "Qwen2.5-0.5B", "Qwen3-0.6B",
        "SmolLM3-3B",
    ],
)  # fmt: skip
def test_shapes_add_up_to_the_published_parameter_count(config, parameters):
    assert sum(prod(shape) for shape in tensor_shapes(config).values()) == parameters


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"head_dim": 12}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("smollm3", {}),
    ],
)
def test_names_and_shapes_are_those_in_the_saved_file(model_type, flags, tiny_reference):
    _, folder = tiny_reference(model_type, flags)
    config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()), str(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert tensor_shapes(config) == saved


def test_input_groups_cover_each_linear_of_a_block_once():
    config = published("LlamaForCausalLM", (64, 32, 48, 2, 4, 2))
    assert [name for group in INPUT_GROUPS for name in group] == list(block_linear_shapes(config))
    for group in INPUT_GROUPS:
        assert len({block_linear_shapes(config)[name][1] for name in group}) == 1, group


def test_linears_are_the_matrices_of_the_blocks_and_an_untied_lm_head():
    untied = published("Qwen3ForCausalLM", (64, 32, 48, 2, 4, 2))
    matrices = {name.removesuffix(".weight") for name, shape in tensor_shapes(untied).items() if len(shape) == 2}
    assert linear_shapes(untied).keys() == matrices - {"model.embed_tokens"}
    tied = published("Qwen3ForCausalLM", (64, 32, 48, 2, 4, 2), tie_word_embeddings=True)
    assert linear_shapes(untied).keys() - linear_shapes(tied).keys() == {"lm_head"}


def test_block_prefix_leads_to_the_blocks_tensors():
    config = published("LlamaForCausalLM", (64, 32, 48, 2, 4, 2))
    assert sum(name.startswith(block_prefix(1)) for name in tensor_shapes(config)) == 9
