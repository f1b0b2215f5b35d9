"""Where the passes run and in which precision: one decision at the start of a run.

Knows nothing about models. Weights and their solvers are always fp32; only forward passes use the compute dtype.
"""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from quantlab.models.device import find_device, multiplies_bf16


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
    place = find_device(device)
    bf16 = stored == torch.bfloat16 and multiplies_bf16(place)
    return Place(place, torch.bfloat16 if bf16 else torch.float32)


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc); does nothing elsewhere.

    Between two groups of linears that is as much as a whole group's solve needs.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
