"""The CPU as an engine's device: torch's own operations, and its packed products for quantized weights.

Knows nothing about files or scheduling.
"""

import torch

from quantlab.errors import UsageError
from quantlab.models.device import use_fast_products
from quantlab.runtime.linears import Linear, RawLinear
from quantlab.runtime.linears_cpu import make_linear
from quantlab.runtime.operations_cpu import CpuOperations
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.sizes import Sizes
from quantlab.runtime.step_builder import StepBuilder
from quantlab.runtime.weights import Weights


class CpuBackend:
    """Torch's kernels on this machine's CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def make_linear(self, raw: RawLinear) -> Linear:
        """The layer that runs `raw`."""
        return make_linear(raw)

    def make_head(self, raw: RawLinear) -> Linear:
        """The output layer, as any other."""
        return make_linear(raw)

    def attention(self, int8_kv: bool) -> str:
        """What attends, in a line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"attention: torch SDPA over pages in {'int8, widened as they are read' if int8_kv else dtype}"

    def runner(self, weights: Weights, sizes: Sizes, sampler: Sampler) -> ModelRunner:
        """A runner with room for keys and values."""
        builder = StepBuilder(sizes.max_num_seqs, sizes.max_blocks, sizes.block_size, self.device)
        pool = (sizes.num_blocks, sizes.block_size)
        operations = CpuOperations(weights.config, self.dtype, builder.tables, pool, sizes.int8_kv)
        return ModelRunner(weights, operations, builder, sampler)


def make_backend(device: torch.device, dtype: torch.dtype, options: EngineOptions) -> CpuBackend:
    """The CPU with the threads that `options` ask for; raises UsageError for what only a GPU has."""
    if options.int8_head:
        raise UsageError("a CPU has no product for it", where="--int8-head", fix="leave it out")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if dtype == torch.float32:
        use_fast_products()
    return CpuBackend(device, dtype)
