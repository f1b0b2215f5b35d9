"""A decoder block in stages: the stages are the block, and each yields what its linears take."""

import pytest
import torch
from torch import nn

from quantlab.models.attention import DenseAttention
from quantlab.models.config import ModelConfig
from quantlab.models.layers import DecoderBlock, RMSNorm
from quantlab.models.naming import INPUT_GROUPS, block_tensor_shapes
from quantlab.models.rope import block_rope


@pytest.fixture(params=["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def config(request) -> ModelConfig:
    sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return ModelConfig.from_json(sizes | heads | {"architectures": [request.param]}, "config.json")


def stages(block: DecoderBlock, x: torch.Tensor, rope, attend) -> dict[str, torch.Tensor]:
    """The input of each group of linears by the name of its first, and the block's output."""
    h = block.attention_input(x)
    a = block.attention_output(h, rope, attend)
    x = block.after_attention(x, a)
    g = block.mlp_input(x)
    m = block.mlp_hidden(g)
    inputs = zip((group[0] for group in INPUT_GROUPS), (h, a, g, m), strict=True)
    return dict(inputs) | {"output": block.after_mlp(x, m)}


def test_stages_yield_the_inputs_that_the_linears_see(config):
    block = DecoderBlock(config)
    seen = {}
    for group in INPUT_GROUPS:
        for name in group:
            block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    x, rope, attend = torch.randn(2, 7, 32), block_rope(config, 0, torch.arange(7), "cpu"), DenseAttention()
    output = block(x, rope, attend)
    forward_inputs = dict(seen)
    staged = stages(block, x, rope, attend)
    assert torch.equal(staged["output"], output)
    for group in INPUT_GROUPS:
        for name in group:
            assert torch.equal(forward_inputs[name], staged[group[0]]), name


def test_parameters_are_named_and_shaped_as_in_the_file(config):
    parameters = {name: tuple(value.shape) for name, value in DecoderBlock(config).named_parameters()}
    assert parameters == block_tensor_shapes(config)


def test_any_module_can_stand_in_for_a_linear(config):
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    block = DecoderBlock(config)
    x, rope = torch.randn(1, 5, 32), block_rope(config, 0, torch.arange(5), "cpu")
    before = stages(block, x, rope, DenseAttention())
    block.mlp.down_proj = Doubled(block.mlp.down_proj)
    after = stages(block, x, rope, DenseAttention())
    middle = block.after_attention(x, before["self_attn.o_proj"])
    torch.testing.assert_close(after["output"] - middle, 2 * (before["output"] - middle))


def test_norm_is_computed_in_fp32_and_returned_in_the_inputs_dtype():
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    # Every element is the nearest bf16; a mean or a root rounded to bf16 would miss it about every other time.
    assert torch.equal(RMSNorm(1024, eps=0.0).bfloat16()(x), exact.bfloat16())
