"""What is remembered of the inputs of a group of linears: second moments, never the tokens themselves.

Pure accumulation on tensors; knows nothing about blocks, files or solvers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of the Hessian computed at a time; only tiles on and above the diagonal are, the rest is mirrored.
TILE = 256


@dataclass(slots=True)
class Moments:
    """Sums over the tokens of one input: `hessian: [K, K]` of x x^T, fp32; `tokens` seen."""

    hessian: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | str) -> "Moments":
        """No tokens seen, for inputs of `features` channels."""
        return cls(torch.zeros(features, features, device=device))

    def add(self, x: Tensor) -> None:
        """Count in x: [T, K], floating."""
        add_outer(self.hessian, x)
        self.tokens += len(x)

    def finish(self) -> None:
        """Mirror the upper tiles and divide by the token count: `hessian` becomes the mean of x x^T."""
        mirror_upper(self.hessian)
        self.hessian /= max(1, self.tokens)


def add_outer(h: Tensor, x: Tensor) -> None:
    """Add the upper tiles of X^T X to `h: [K, K]` fp32, about half of the work for large K; x: [T, K]."""
    features = h.shape[0]
    for start in range(0, features, TILE):
        stop = min(start + TILE, features)
        add_product(h[start:stop, start:], x[:, start:stop], x[:, start:])


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add X^T Y to `total: [K, N]` fp32, for x: [T, K] and y: [T, N] of one dtype.

    On a CPU the product of bf16 inputs comes as bf16, at twice the rate of fp32. It is summed in fp32 and rounded once
    a call, so the mean over many calls is as exact as TF32: 3e-4 relative after sixteen calls.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        total += x.t() @ y
    else:
        total.addmm_(x.float().t(), y.float())


def mirror_upper(h: Tensor) -> None:
    """Copy the upper triangle of `h: [K, K]` onto the lower one, in place."""
    for start in range(0, h.shape[0], TILE):
        stop = min(start + TILE, h.shape[0])
        h[stop:, start:stop] = h[start:stop, stop:].t()
