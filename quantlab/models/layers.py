"""One decoder block, cut at the places where quantization looks: the inputs of its four groups of linears.

Knows nothing about checkpoints, caches or quantization; any module with forward(x) -> y may stand in for a linear.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from quantlab.models.attention import Attend
from quantlab.models.config import ModelConfig
from quantlab.models.naming import block_linear_shapes, has_bias
from quantlab.models.rope import RopeTables, rotate


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a weight per channel (arXiv 1910.07467); fp32 inside."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., size] -> [.., size] in x's dtype."""
        wide = x.float()
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


class SelfAttention(nn.Module):
    """The projections around attention, with the norms on queries and keys where the family has them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = _linear(config, "self_attn.q_proj")
        self.k_proj = _linear(config, "self_attn.k_proj")
        self.v_proj = _linear(config, "self_attn.v_proj")
        self.o_proj = _linear(config, "self_attn.o_proj")
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, h: Tensor, rope: RopeTables | None, attend: Attend) -> Tensor:
        """h: [B, T, hidden] -> what o_proj takes: [B, T, H*D]."""
        q = self.q_norm(self._heads(self.q_proj(h))).transpose(1, 2)
        k = self.k_norm(self._heads(self.k_proj(h))).transpose(1, 2)
        v = self._heads(self.v_proj(h)).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """The gated feed-forward layer (SwiGLU, arXiv 2002.05202), up to its last projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = _linear(config, "mlp.gate_proj")
        self.up_proj = _linear(config, "mlp.up_proj")
        self.down_proj = _linear(config, "mlp.down_proj")

    def forward(self, h: Tensor) -> Tensor:
        """h: [B, T, hidden] -> what down_proj takes: [B, T, intermediate]."""
        return silu(self.gate_proj(h)) * self.up_proj(h)


class DecoderBlock(nn.Module):
    """One pre-norm transformer block; submodules are named as in Hugging Face checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_input(self, x: Tensor) -> Tensor:
        """x: [B, T, hidden] -> the input of q_proj, k_proj and v_proj: [B, T, hidden]."""
        return self.input_layernorm(x)

    def attention_output(self, h: Tensor, rope: RopeTables | None, attend: Attend) -> Tensor:
        """h: [B, T, hidden] -> the input of o_proj: [B, T, H*D]; `rope` None means no rotation."""
        return self.self_attn(h, rope, attend)

    def after_attention(self, x: Tensor, a: Tensor) -> Tensor:
        """x: [B, T, hidden] plus o_proj of a: [B, T, H*D] -> [B, T, hidden]."""
        return x + self.self_attn.o_proj(a)

    def mlp_input(self, x: Tensor) -> Tensor:
        """x: [B, T, hidden] -> the input of gate_proj and up_proj: [B, T, hidden]."""
        return self.post_attention_layernorm(x)

    def mlp_hidden(self, h: Tensor) -> Tensor:
        """h: [B, T, hidden] -> the input of down_proj: [B, T, intermediate]."""
        return self.mlp(h)

    def after_mlp(self, x: Tensor, m: Tensor) -> Tensor:
        """x: [B, T, hidden] plus down_proj of m: [B, T, intermediate] -> [B, T, hidden]."""
        return x + self.mlp.down_proj(m)

    def forward(self, x: Tensor, rope: RopeTables | None, attend: Attend) -> Tensor:
        """x: [B, T, hidden] -> [B, T, hidden], through all the stages."""
        x = self.after_attention(x, self.attention_output(self.attention_input(x), rope, attend))
        return self.after_mlp(x, self.mlp_hidden(self.mlp_input(x)))


def _linear(config: ModelConfig, name: str) -> nn.Module:
    out_features, in_features = block_linear_shapes(config)[name]
    return nn.Linear(in_features, out_features, bias=has_bias(config, name))
