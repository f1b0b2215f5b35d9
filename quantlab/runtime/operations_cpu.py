"""What a step does on the CPU besides linears, in torch's own operations.

Numbers are those of models.layers, operation by operation. Knows nothing about sequences or sampling.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from quantlab.models.config import ModelConfig
from quantlab.models.rope import RopeTables, rotate
from quantlab.runtime.kv_cpu import PagedKV, StepAttention
from quantlab.runtime.step import Step
from quantlab.runtime.weights import Block, Weights


class CpuOperations:
    """Operations over a cache of `blocks` blocks; `tables` say which of them a sequence slot has."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, tables: Tensor, pool: tuple[int, int], int8: bool):
        blocks, self._block_size = pool
        shape = (blocks, self._block_size, config.num_kv_heads, config.head_dim)
        self._caches = [PagedKV(shape, dtype, int8) for _ in range(config.num_layers)]
        self._dtype, self._tables = dtype, tables

    def embed(self, weights: Weights, step: Step, last: Tensor) -> Tensor:
        """States [T, hidden] of the step's tokens."""
        ids = torch.where(step.ids < 0, last[(-1 - step.ids).clamp_min(0)], step.ids)
        return embedding(ids, weights.embedding)

    def norm(self, x: Tensor, weight: Tensor, eps: float, int8: bool) -> Tensor:
        """RMSNorm of x: [T, hidden]; no linear of a CPU asks for INT8."""
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float, int8: bool) -> tuple[Tensor, Tensor]:
        """RMSNorm of x + more, and x + more itself."""
        x = x.add_(more)
        return rms_norm(x, weight, eps), x

    def gate(self, x: Tensor, int8: bool) -> Tensor:
        """SwiGLU (arXiv 2002.05202) of x: [T, gate | up]."""
        gate, up = x.chunk(2, dim=1)
        return silu(gate) * up

    def attention(self, weights: Weights, step: Step) -> "_Attention":
        """The step's attention."""
        shared = StepAttention(weights.config, step, self._tables, self._block_size, self._dtype)
        cos, sin = (torch.cat((rows := table[step.positions], rows), dim=1) for table in (weights.cos, weights.sin))
        return _Attention(self, weights.config, step, shared, (cos, sin))


class _Attention:
    """One step's attention for every layer."""

    def __init__(
        self, operations: CpuOperations, config: ModelConfig, step: Step, shared: StepAttention, rope: RopeTables
    ):
        self._operations, self._config, self._step = operations, config, step
        self._shared, self._rope = shared, rope

    def __call__(self, layer: int, block: Block, qkv: Tensor) -> Tensor:
        """qkv: [T, (H + 2 H_kv) * D] -> [T, H * D]; writes the layer's keys and values."""
        config, cache = self._config, self._operations._caches[layer]
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(heads, dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            q = rms_norm(q, block.q_norm, config.rms_norm_eps)
            k = rms_norm(k, block.k_norm, config.rms_norm_eps)
        if config.uses_rope(layer):
            q, k = (rotate(x.transpose(0, 1), self._rope).transpose(0, 1) for x in (q, k))
        cache.write(self._step.cache_slots, k, v)
        return self._shared(q, cache, config.layer_window(layer))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of x, fp32 inside (arXiv 1910.07467)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
