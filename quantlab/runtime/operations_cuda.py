"""What a step does on a GPU besides linears: the fused and the attention kernels of quantlab_kernels.

Nothing here waits for the device, and what a step with slices of one token launches depends on nothing that a captured
graph could not know. Knows nothing about sequences or sampling.
"""

import torch
from torch import Tensor

from quantlab.models.config import ModelConfig
from quantlab.runtime.linears import Activations, Int8Rows
from quantlab.runtime.step import Step
from quantlab.runtime.weights import Block, Weights
from quantlab_kernels import fused
from quantlab_kernels.kv_cache import HeadNorm, KVCache, Pages, Rope, empty_cache, split_qkv, write_kv
from quantlab_kernels.paged_decode import paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill
from quantlab_kernels.rows import empty_rows


class CudaOperations:
    """Operations over a cache of `pool` = (blocks, tokens a block); `tables` say which of them a sequence slot has."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, tables: Tensor, pool: tuple[int, int], int8: bool):
        blocks, self.block_size = pool
        like = torch.empty(0, dtype=dtype, device=tables.device)
        self.caches: list[KVCache] = [
            empty_cache(blocks, config.num_kv_heads, self.block_size, config.head_dim, like, int8)
            for _ in range(config.num_layers)
        ]
        for cache in self.caches:
            if cache.scales is not None:
                cache.scales.zero_()  # blocks are widened whole: what was never written must at least be a number
        self.tables = tables

    def embed(self, weights: Weights, step: Step, last: Tensor) -> Tensor:
        """States [T, hidden] of the step's tokens."""
        return fused.embed(step.ids, weights.embedding, last)

    def norm(self, x: Tensor, weight: Tensor, eps: float, int8: bool) -> Activations:
        """RMSNorm of x: [T, hidden]."""
        if int8:
            codes, scales, _ = fused.rms_norm_quantized(x, weight, eps)
            return Int8Rows(codes, scales)
        return fused.rms_norm(x, weight, eps)[0]

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float, int8: bool) -> tuple[Activations, Tensor]:
        """RMSNorm of x + more, and x + more itself."""
        if int8:
            codes, scales, summed = fused.rms_norm_quantized(x, weight, eps, more)
            return Int8Rows(codes, scales), summed
        return fused.rms_norm(x, weight, eps, more)

    def gate(self, x: Tensor, int8: bool) -> Activations:
        """SwiGLU of x: [T, gate | up]."""
        return Int8Rows(*fused.silu_mul_quantized(x)) if int8 else fused.silu_mul(x)

    def attention(self, weights: Weights, step: Step) -> "_Attention":
        """The step's attention."""
        return _Attention(self, weights, step)


class _Attention:
    """One step's attention for every layer: slices of one token in one kernel, chunks in another."""

    def __init__(self, operations: CudaOperations, weights: Weights, step: Step):
        self._config, self._caches, self._step = weights.config, operations.caches, step
        width = -(-step.max_length // (4 * operations.block_size)) * 4  # rows of whole vectors of 16 bytes
        tables = operations.tables[:, :width].index_select(0, step.slots)
        singles = step.singles
        self._decode = self._prefill = None
        if singles:
            # Settled: tables and lengths are made once a step, ahead of the first norm, for which write_kv waits.
            self._decode = Pages(tables[:singles], step.lengths[:singles], step.max_single_length, settled=True)
        if singles < step.lengths.shape[0]:
            # A view that begins at another alignment would be another kernel to compile.
            lengths = step.lengths[singles:].clone() if singles % 4 else step.lengths[singles:]
            self._prefill = Pages(tables[singles:], lengths, step.max_length)
            self._chunks = Chunks((step.starts[singles:] - singles).to(torch.int32), step.longest)
            # Tokens that only fill a graph's frame belong to no sequence: nobody writes what they attend to. One tensor
            # for all layers: a layer's is read before the next one attends.
            heads, head_dim = weights.config.num_heads, weights.config.head_dim
            like = weights.embedding
            out = empty_rows(step.tokens, heads * head_dim, like.dtype, like.device).zero_()
            self._out = out.view(step.tokens, heads, head_dim)
        self._rope = Rope(weights.cos, weights.sin, step.positions)

    def __call__(self, layer: int, block: Block, qkv: Tensor) -> Tensor:
        """qkv: [T, (H + 2 H_kv) * D] -> [T, H * D]; writes the layer's keys and values."""
        config, cache, singles = self._config, self._caches[layer], self._step.singles
        q, k, v = split_qkv(qkv, config.num_heads, config.num_kv_heads, config.head_dim)
        norm = None
        if block.q_norm is not None and block.k_norm is not None:
            norm = HeadNorm(block.q_norm, block.k_norm, config.rms_norm_eps)
        write_kv(cache, q, k, v, self._step.cache_slots, self._rope if config.uses_rope(layer) else None, norm)
        window = config.layer_window(layer)
        if self._prefill is None:
            assert self._decode is not None
            return paged_decode(q, cache, self._decode, window=window).flatten(1)
        out = self._out
        if self._decode is not None:
            paged_decode(q[:singles], cache, self._decode, window=window, out=out[:singles])
        paged_prefill(q[singles:], cache, self._prefill, self._chunks, window=window, out=out[singles:])
        return out.flatten(1)
