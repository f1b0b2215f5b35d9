"""Compiles attention, fused, sampling and GPTQ kernels for a GPU that is not there: one JSON line about each.

Run by test_attention_compiles in a process of its own, since kernels are interpreted in that of the tests.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from quantlab_kernels import fused, sampling
from quantlab_kernels.gptq_block import gptq_block
from quantlab_kernels.kv_cache import Pages, Rope, empty_cache, write_kv
from quantlab_kernels.paged_decode import paged_decode
from quantlab_kernels.paged_prefill import Chunks, paged_prefill

CAPABILITY = int(sys.argv[1])
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# The int8 kernel's assembly needs the four words of a lane in neighbouring registers: the layout of the tensor that it
# takes apart must have the last axis as its first two register bases.
SPLIT = re.compile(r'inline_asm "mov.b32 \$0, \$4.*? : tensor<[^>]*, (#\w+)> ->')
FIRST_IN_REGISTERS = re.compile(
    r"linear<\{register = \[\[(?:0, )+1\], \[(?:0, )+2\]|blocked<\{sizePerThread = \[(?:\d+, )+4\],.*order = \[4,"
)


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


class OnAbsentGPU(Tensor):
    """A tensor without data that says it lies on a GPU, aligned as allocations are."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", 0))

    def data_ptr(self) -> int:
        return 0


real_empty, real_run = torch.empty, JITFunction.run


def empty(*shape: Any, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
    """torch.empty on the absent GPU."""
    return real_empty(*shape, dtype=dtype, device="meta").as_subclass(OnAbsentGPU)


def arange(end: int, dtype: torch.dtype, device: object) -> Tensor:
    """torch.arange there."""
    return empty(end, dtype=dtype)


def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """Stands for a launch: compiles and reports."""
    kernel = real_run(self, *arguments, grid=grid, warmup=True, **options)
    report(self.__name__, kernel)
    return kernel


def report(name: str, kernel: Any) -> None:
    """One JSON line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found
    ir = kernel.asm["ttgir"]
    layouts = [re.search(re.escape(layout) + r" = #ttg\.(.*)", ir) for layout in set(SPLIT.findall(ir))]
    line = {
        "kernel": name,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "products": sorted(set(re.findall(r"\b(\w*MMA)\b", sass.stdout))),
        "words_in_order": all(layout and FIRST_IN_REGISTERS.search(layout[1]) for layout in layouts),
        "splits": len(layouts),
        "int_to_float": len(re.findall(r"\bI2F\w*", sass.stdout)),
    }
    print(json.dumps(line), flush=True)


def attention() -> None:
    """At the shapes of Llama-3-8B; a step of one sequence reads its pages early, as a graph's does."""
    q, kv = empty(8, 32, 128, dtype=torch.bfloat16), empty(8, 8, 128, dtype=torch.bfloat16)
    pages = Pages(empty(8, 64, dtype=torch.int32), empty(8, dtype=torch.int32), 1024)
    one = Pages(empty(1, 64, dtype=torch.int32), empty(1, dtype=torch.int32), 1024, settled=True)
    rope = Rope(*(empty(99, 64, dtype=torch.float32) for _ in range(2)), empty(8, dtype=torch.int64))
    plain, quantized = (empty_cache(9, 8, 16, 128, q, int8) for int8 in (False, True))
    write_kv(quantized, q, kv, kv, empty(8, dtype=torch.int64), rope)
    for cache in (quantized, plain):
        paged_decode(q, cache, pages)
        paged_decode(empty(1, 32, 128, dtype=torch.bfloat16), cache, one)
    for window in (None, 1024):
        paged_prefill(q, quantized, pages, Chunks(empty(9, dtype=torch.int32), 4), window=window)


def the_rest() -> None:
    """What lies between linears, the sampler's kernels, a block of GPTQ."""
    x, weight = empty(8, 4096, dtype=torch.bfloat16), empty(4096, dtype=torch.bfloat16)
    fused.rms_norm(x, weight, 1e-5, x)
    fused.rms_norm_quantized(x, weight, 1e-5, x)
    fused.silu_mul(empty(8, 28672, dtype=torch.bfloat16))
    fused.silu_mul_quantized(empty(8, 28672, dtype=torch.bfloat16))
    fused.embed(empty(8, dtype=torch.int64), x)
    scores = empty(8, 128512, dtype=torch.float32)
    sampling.greatest(scores)
    sampling.nucleus_floor(scores, empty(8, dtype=torch.float32))
    sampling.race(scores, empty(8, 2, dtype=torch.int32))
    block, inner = empty(128, 1024, dtype=torch.float32), empty(128, 128, dtype=torch.float32)
    gptq_block(block, block, (block, block), inner.t(), (block, block), (-8, 7))


def main() -> None:
    """Every kernel."""
    triton.runtime.driver.set_active(AbsentGPU())
    torch.empty, torch.arange, JITFunction.run = empty, arange, compile_only
    torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    attention()
    the_rest()


if __name__ == "__main__":
    main()
