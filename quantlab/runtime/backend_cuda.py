"""A GPU as an engine's device: the kernels of quantlab_kernels, compiled and captured before the first request.

Knows nothing about files or scheduling.
"""

import torch

from quantlab.errors import UnsupportedModel
from quantlab.log import logger, timed
from quantlab.models.config import ModelConfig
from quantlab.runtime.graphs import Reach, StepGraphs, mixed_frames
from quantlab.runtime.linears import Linear, RawLinear
from quantlab.runtime.linears_cuda import make_int8_head, make_linear, name_of, warm_linears
from quantlab.runtime.operations_cuda import CudaOperations
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.sizes import Sizes
from quantlab.runtime.step_builder import StepBuilder
from quantlab.runtime.weights import Weights
from quantlab_kernels.attention_warmup import Limits, warm_attention
from quantlab_kernels.kv_cache import HEAD_DIMS, Rope, split_qkv
from quantlab_kernels.paged_decode import choose_plan
from quantlab_kernels.warm_up import token_counts

LOG = logger(__name__)
# Longer sequences beside pieces of prompts over an INT8 cache are launched one by one: widening works by the length.
MIXED_INT8_TOKENS = 4096


class CudaBackend:
    """One NVIDIA GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype, options: EngineOptions):
        self.device, self.dtype = device, dtype
        self._graphs, self._int8_head = options.cuda_graphs, options.int8_head

    def make_linear(self, raw: RawLinear) -> Linear:
        """The layer that runs `raw`."""
        return make_linear(raw, self.dtype)

    def make_head(self, raw: RawLinear) -> Linear:
        """The output layer, in INT8 where the user asked for it."""
        if self._int8_head and isinstance(raw.weight, torch.Tensor):
            return make_int8_head(raw.weight)
        return self.make_linear(raw)

    def attention(self, int8_kv: bool) -> str:
        """What attends, in a line."""
        kept = "int8" if int8_kv else name_of(self.dtype)
        return f"attention: quantlab paged decode and prefill, keys and values in {kept}"

    def runner(self, weights: Weights, sizes: Sizes, sampler: Sampler) -> ModelRunner:
        """A runner with room for keys and values, its kernels compiled and its decode steps captured.

        Raises UnsupportedModel for heads of a size without kernels.
        """
        check_heads(weights.config)
        builder = StepBuilder(sizes.max_num_seqs, sizes.max_blocks, sizes.block_size, self.device)
        pool = (sizes.num_blocks, sizes.block_size)
        operations = CudaOperations(weights.config, self.dtype, builder.tables, pool, sizes.int8_kv)
        runner = ModelRunner(weights, operations, builder, sampler)
        self._warm(weights, operations, sizes)
        with timed(LOG, "sampler's kernels"):
            sampler.warm_up(self.dtype)
        if self._graphs:
            runner.graphs = self._capture(runner, operations, weights.config, sizes)
        return runner

    @torch.inference_mode()
    def _warm(self, weights: Weights, operations: CudaOperations, sizes: Sizes) -> None:
        config, most = weights.config, sizes.max_batch_tokens
        widest = max(frame.tokens for frame in mixed_frames(sizes.max_num_seqs, most))
        counts = token_counts(max(most, widest))
        first = weights.blocks[0]
        with timed(LOG, "kernels of linears"):
            compiled = warm_linears([first.qkv, first.o, first.gate_up, first.down, weights.head], counts)
        q, k, _ = self._queries(config)
        rope = Rope(weights.cos, weights.sin, torch.zeros(1, dtype=torch.int64, device=self.device))
        limits = Limits(sizes.max_num_seqs, sizes.max_model_len, settled=True)
        with timed(LOG, "kernels of attention"):
            launched = warm_attention(q, k, operations.caches[0], limits, rope, None, set(config.windows))
        LOG.info("compiled %d products, launched %d attention kernels", compiled, launched)

    def _capture(
        self, runner: ModelRunner, operations: CudaOperations, config: ModelConfig, sizes: Sizes
    ) -> StepGraphs:
        q = self._queries(config)[0]
        cache = operations.caches[0]
        windows = sorted(set(config.windows), key=str)

        def cut(size: int, length: int) -> object:
            return tuple(choose_plan(q, cache, size, length, window) for window in windows)

        most, longest = min(sizes.max_num_seqs, sizes.max_batch_tokens), sizes.max_model_len
        mixed = min(longest, MIXED_INT8_TOKENS) if sizes.int8_kv else longest
        reach = Reach(most, sizes.max_batch_tokens, longest, mixed, cut)
        graphs = StepGraphs(runner.forward, runner.builder, reach)
        with timed(LOG, "graphs"):
            captured = graphs.capture()
        LOG.info("captured %d graphs", captured)
        return graphs

    def _queries(self, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views like those of a step's q, k and v."""
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        qkv = torch.zeros(1, width, dtype=self.dtype, device=self.device)
        return split_qkv(qkv, config.num_heads, config.num_kv_heads, config.head_dim)


def make_backend(device: torch.device, dtype: torch.dtype, options: EngineOptions) -> CudaBackend:
    """The GPU `device`, current from now on: kernels are launched on the current one."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return CudaBackend(torch.device("cuda", index), dtype, options)


def check_heads(config: ModelConfig) -> None:
    """Refuse a model whose attention has no kernel."""
    if config.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        message = f"head_dim {config.head_dim} has no GPU kernel; those there are: {known}"
        raise UnsupportedModel(message, fix="--device cpu")
