"""What every launcher asks before it launches; knows nothing about any one kernel."""

from functools import cache

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret


def require(condition: bool, sentence: str) -> None:
    """Refuse an argument of a kernel in one sentence: ValueError."""
    if not condition:
        raise ValueError(sentence)


def require_gpu(name: str, x: Tensor, reference: str) -> None:
    """Refuse a tensor that no kernel can read: ValueError that names the module which serves there."""
    on_gpu = x.is_cuda or INTERPRETED
    require(on_gpu, f"{name} is on {x.device}; the kernels run on a GPU (use quantlab_kernels.{reference} there)")


def has_pdl(x: Tensor) -> bool:
    """Whether kernels on x's device may start before the one ahead of them ends (programmatic dependent launch)."""
    return x.is_cuda and _capability(x.device) >= (9, 0) and not torch.version.hip


def has_ptx(x: Tensor) -> bool:
    """Whether kernels on x's device may hold inline PTX."""
    return x.is_cuda and not torch.version.hip


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
