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
    device = find_device(options.device)
    dtype = choose_dtype(options.dtype, device, config)
    name = "cuda" if device.type == "cuda" else "cpu"
    backend: Backend = import_module(f"quantlab.runtime.backend_{name}").make_backend(device, dtype, options)
    return backend


def choose_dtype(asked: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """The activations' dtype: the checkpoint's unless the device is slow in it.

    A CPU runs 16-bit checkpoints in bf16 where it multiplies bf16 and in fp32 elsewhere; a GPU runs none in fp32.
    """
    if asked != "auto" and asked not in DTYPES:
        raise UsageError(f"dtype {asked[:40]!r} is not one of auto, {', '.join(DTYPES)}", where="--dtype")
    dtype = DTYPES[config.dtype if asked == "auto" else asked]
    if device.type == "cuda":
        if asked == "float32":
            raise UsageError("the GPU's kernels take 16-bit activations", where="--dtype", fix="--dtype bfloat16")
        return torch.bfloat16 if dtype == torch.float32 else dtype
    if asked != "auto" or dtype == torch.float32:
        return dtype
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
