"""Which device an engine runs on, in which dtype, and what a device has to offer for that.

Knows nothing about files or steps. A device's kernels are imported only when it is chosen: Triton is not there on
every system, and costs a start half a second where it is.
"""

from importlib import import_module
from typing import Protocol

import torch

from quantlab.errors import UsageError
from quantlab.models.config import ModelConfig
from quantlab.models.device import find_device, multiplies_bf16
from quantlab.runtime.linears import Linear, RawLinear
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.sizes import Sizes
from quantlab.runtime.weights import Weights
from quantlab.schemes import Scheme, describe
from quantlab_kernels.layout import QuantizedWeight

# What `kernels_here` asks about, with layers of so many rows and columns.
SCHEMES: tuple[Scheme | None, ...] = (None, Scheme("w4a16", 128), Scheme("w8a8", None), Scheme("w8a16", None))
SIZE = 256
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Backend(Protocol):
    """A device's kernels."""

    device: torch.device
    dtype: torch.dtype

    def make_linear(self, raw: RawLinear) -> Linear:
        """The layer that runs `raw`, whose tensors lie on the device."""

    def make_head(self, raw: RawLinear) -> Linear:
        """The output layer."""

    def attention(self, int8_kv: bool) -> str:
        """What attends, and in what keys and values are kept, in a line."""

    def runner(self, weights: Weights, sizes: Sizes, sampler: Sampler) -> ModelRunner:
        """A runner with room for keys and values, ready to serve: nothing is compiled when a step comes."""


def choose_backend(options: EngineOptions, config: ModelConfig) -> Backend:
    """The backend that `options` ask for; raises UsageError for a device or dtype that cannot be."""
    return backend_for(options, config.dtype)


def backend_for(options: EngineOptions, stored: str) -> Backend:
    """`choose_backend` for a checkpoint whose floats are stored in the dtype named `stored`."""
    device = find_device(options.device)
    dtype = choose_dtype(options.dtype, device, stored)
    name = "cuda" if device.type == "cuda" else "cpu"
    backend: Backend = import_module(f"quantlab.runtime.backend_{name}").make_backend(device, dtype, options)
    return backend


def kernels_here() -> dict[str, str]:
    """Scheme -> what serves it on this machine, asked of the code that chooses it with small layers."""
    backend = backend_for(EngineOptions(), "bfloat16")
    found = {}
    for scheme in SCHEMES:
        weight: torch.Tensor | QuantizedWeight = torch.zeros(SIZE, SIZE, dtype=backend.dtype, device=backend.device)
        if scheme is not None:
            codes = torch.zeros(SIZE, SIZE, dtype=torch.int8, device=backend.device)
            scales = torch.ones(SIZE, scheme.groups(SIZE), dtype=backend.dtype, device=backend.device)
            weight = QuantizedWeight(codes, scales, None, scheme.group_size or SIZE)
        found[describe(scheme)] = backend.make_linear(RawLinear(weight, scheme, None)).kernel
    return found


def choose_dtype(asked: str, device: torch.device, stored: str) -> torch.dtype:
    """The activations' dtype: the checkpoint's (`stored`) unless the device is slow in it.

    A CPU runs 16-bit checkpoints in bf16 where it multiplies bf16 and in fp32 elsewhere; a GPU runs none in fp32.
    """
    if asked != "auto" and asked not in DTYPES:
        raise UsageError(f"dtype {asked[:40]!r} is not one of auto, {', '.join(DTYPES)}", where="--dtype")
    dtype = DTYPES[stored if asked == "auto" else asked]
    if device.type == "cuda":
        if asked == "float32":
            raise UsageError("the GPU's kernels take 16-bit activations", where="--dtype", fix="--dtype bfloat16")
        return torch.bfloat16 if dtype == torch.float32 else dtype
    if asked != "auto" or dtype == torch.float32:
        return dtype
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
