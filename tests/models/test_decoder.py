"""Building models from named tensors, streaming them block by block, and swapping their linears."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from quantlab.models.attention import DenseAttention, KVCache, MaskedAttention, causal_mask
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import build_block, build_model
from quantlab.models.layers import RMSNorm
from quantlab.models.naming import EMBEDDING, FINAL_NORM, block_prefix, block_tensor_shapes, linear_shapes
from quantlab.models.rope import block_rope

IDS = torch.arange(48).view(2, 24)


@pytest.fixture
def checkpoint(tiny_reference):
    """(config, tensors by full name) of a model with NoPE layers and windows."""
    flags = {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5}
    _, folder = tiny_reference("smollm3", flags)
    raw = json.loads((folder / "config.json").read_text())
    return ModelConfig.from_json(raw, str(folder)), load_file(folder / "model.safetensors")


@torch.no_grad()
def test_blocks_streamed_one_at_a_time_equal_the_whole_model(checkpoint):
    config, tensors = checkpoint
    x = tensors[EMBEDDING][IDS]
    for layer in range(config.num_layers):
        weights = {name: tensors[block_prefix(layer) + name] for name in block_tensor_shapes(config)}
        block = build_block(config, layer, weights, torch.float32, "cpu")
        rope = block_rope(config, layer, torch.arange(24), "cpu")
        x = block(x, rope, DenseAttention(config.layer_window(layer)))
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight.copy_(tensors[FINAL_NORM])
    model = build_model(config, tensors.__getitem__, torch.float32, "cpu")
    assert torch.equal(norm(x), model.hidden(IDS))
    assert torch.equal(model.logits(model.hidden(IDS)), model(IDS))


def test_building_asks_for_each_tensor_once_and_draws_no_random_numbers(checkpoint):
    config, tensors = checkpoint
    asked = []
    state = torch.get_rng_state()
    build_model(config, lambda name: asked.append(name) or tensors[name], torch.float32, "cpu")
    assert sorted(asked) == sorted(tensors)
    assert torch.equal(torch.get_rng_state(), state)


def test_building_casts_every_tensor_and_leaves_none_on_meta(checkpoint):
    config, tensors = checkpoint
    model = build_model(config, tensors.__getitem__, torch.bfloat16, "cpu")
    assert {(p.dtype, p.device.type, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, "cpu", False)}


def test_tied_head_is_the_embedding_and_an_untied_one_is_not(checkpoint, tiny_reference, load_tiny):
    config, tensors = checkpoint
    tied = build_model(config, tensors.__getitem__, torch.float32, "cpu")
    assert tied.lm_head.weight is tied.embed_tokens.weight
    untied = load_tiny(tiny_reference("qwen2", {"tie_word_embeddings": False})[1])
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)


def test_block_uses_the_tensors_it_is_given(checkpoint):
    config, tensors = checkpoint
    weights = {name: tensors[block_prefix(0) + name] for name in block_tensor_shapes(config)}
    block = build_block(config, 0, weights, torch.float32, "cpu")
    assert block.mlp.up_proj.weight.data_ptr() == weights["mlp.up_proj.weight"].data_ptr()


def test_block_with_a_tensor_missing_or_too_many_is_an_assertion(checkpoint):
    config, tensors = checkpoint
    weights = {name: tensors[block_prefix(0) + name] for name in block_tensor_shapes(config)}
    with pytest.raises(AssertionError, match="extra"):
        build_block(config, 0, weights | {"extra": torch.ones(1)}, torch.float32, "cpu")
    del weights["mlp.up_proj.weight"]
    with pytest.raises(AssertionError, match=r"layer 0: \['mlp.up_proj.weight'\]"):
        build_block(config, 0, weights, torch.float32, "cpu")


@torch.no_grad()
def test_linears_are_found_and_replaced_by_full_module_name(checkpoint):
    config, tensors = checkpoint
    model = build_model(config, tensors.__getitem__, torch.float32, "cpu")
    for name, shape in linear_shapes(config).items():
        assert tuple(model.linear(name).weight.shape) == shape
    before = model(IDS)
    model.set_linear("model.layers.2.mlp.down_proj", nn.Linear(48, 32))
    model.set_linear("lm_head", nn.Linear(32, 5))
    assert model(IDS).shape == (2, 24, 5)
    assert before.shape == (2, 24, 96)


@torch.no_grad()
def test_cache_counts_the_tokens_it_took(checkpoint):
    config, tensors = checkpoint
    model = build_model(config, tensors.__getitem__, torch.float32, "cpu")
    cache = KVCache(config, batch=2, capacity=24, dtype=torch.float32, device="cpu")
    model(IDS[:, :20], cache)
    assert cache.length == 20
    with pytest.raises(AssertionError, match="25 tokens in a cache of 24"):
        model(IDS[:, :5], cache)


@torch.no_grad()
def test_states_follow_the_positions_and_the_attention_that_the_caller_gives(checkpoint):
    config, tensors = checkpoint
    model = build_model(config, tensors.__getitem__, torch.float32, "cpu")
    # Each row reversed in memory: the positions and the mask alone say what comes before what.
    positions = torch.arange(24).flip(0).expand(2, 24)
    order = positions[0]

    def attend(layer):
        mask = causal_mask(24, 24, config.layer_window(layer), IDS.device)
        return MaskedAttention(mask[order][:, order][None, None])

    states = model.states(IDS.flip(1), positions, attend)
    torch.testing.assert_close(states.flip(1), model.hidden(IDS), atol=1e-5, rtol=1e-5)
