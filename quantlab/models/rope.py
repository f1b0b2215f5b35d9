"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) with the five ways of stretching its context.

Knows nothing about layers or caches: positions in, cosines and sines out, both in fp32.
"""

import math

import torch
from torch import Tensor

from quantlab.models.config import ModelConfig
from quantlab.models.rope_config import RopeConfig

RopeTables = tuple[Tensor, Tensor]


class Rope:
    """The tables of one model; stateless, so a call depends on its positions alone."""

    def __init__(self, config: ModelConfig):
        self.config = config.rope
        self.head_dim = config.head_dim
        self.scale = attention_scale(config.rope)

    def tables(self, positions: Tensor) -> RopeTables:
        """Cosines and sines for positions: [T] or [B, T] int64; returns two [.., T, D] fp32 on the same device."""
        length = int(positions.max()) + 1 if self.config.type == "dynamic" else 0
        frequencies = inverse_frequencies(self.config, self.head_dim, length).to(positions.device)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def block_rope(config: ModelConfig, layer: int, positions: Tensor, device: torch.device | str) -> RopeTables | None:
    """The tables that `layer` needs for positions: [T] or [B, T] int64, on `device`; None if it has no rotation."""
    return Rope(config).tables(positions.to(device)) if config.uses_rope(layer) else None


def rotate(x: Tensor, rope: RopeTables) -> Tensor:
    """x: [B, H, T, D] turned by its positions' angles; pairs are (i, i + D/2), computed in x's dtype."""
    cos, sin = (table.to(x.dtype).unsqueeze(-3) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int = 0) -> Tensor:
    """Radians per position of each pair: [D/2] fp32; `length` in tokens matters to `dynamic` alone."""
    if rope.type == "dynamic":
        return _plain(_dynamic_theta(rope, head_dim, length), head_dim)
    plain = _plain(rope.theta, head_dim)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, plain, head_dim) if rope.type == "yarn" else plain


def attention_scale(rope: RopeConfig) -> float:
    """What yarn multiplies cosines and sines by (arXiv 2309.00071, eq. 22); 1 for the other types."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return _magnitude(rope.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _plain(theta: float, head_dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _dynamic_theta(rope: RopeConfig, head_dim: int, length: int) -> float:
    """NTK-aware base that grows once the sequence is longer than the trained context."""
    stretch = rope.factor * max(length, rope.max_position) / rope.max_position - (rope.factor - 1)
    return float(rope.theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    turns = rope.max_position * plain / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2): a linear ramp between two pair indices."""
    low, high = (_yarn_pair(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def _yarn_pair(rope: RopeConfig, head_dim: int, turns: float) -> float:
    """The (fractional) pair index whose angle makes `turns` full turns over the trained context."""
    return head_dim * math.log(rope.max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
