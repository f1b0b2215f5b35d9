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
        add_outer(self.hessian, x, self.tokens)
        self.tokens += len(x)

    def finish(self) -> None:
        """Mirror the upper tiles and divide by the token count: `hessian` becomes the mean of x x^T."""
        mirror_upper(self.hessian)
        self.hessian /= max(1, self.tokens)


def add_outer(h: Tensor, x: Tensor, seen: int) -> None:
    """Add the upper tiles of X^T X to `h: [K, K]` fp32, a sum over `seen` tokens, in half the work; x: [T, K]."""
    features = h.shape[0]
    for start in range(0, features, TILE):
        stop = min(start + TILE, features)
        add_product(h[start:stop, start:], x[:, start:stop], x[:, start:], seen)


def add_product(total: Tensor, x: Tensor, y: Tensor, seen: int) -> None:
    """Add X^T Y to `total: [K, N]` fp32, a sum over `seen` tokens, for x: [T, K] and y: [T, N] of one dtype.

    A CPU multiplies bf16 at twice the rate of fp32, but gives bf16 back. What is expected of these tokens, going by
    those before, is therefore subtracted before that rounding and added after it: the rounding then falls on the
    difference alone. Without this a direction that all tokens share would drown the others in its rounding errors.
    """
    if seen == 0 or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        total.addmm_(x.float().t(), y.float())
        return
    expected = (total * (len(x) / seen)).to(torch.bfloat16)
    total += torch.addmm(expected, x.t(), y, beta=-1)
    total += expected


def mirror_upper(h: Tensor) -> None:
    """Copy the upper triangle of `h: [K, K]` onto the lower one, in place."""
    for start in range(0, h.shape[0], TILE):
        stop = min(start + TILE, h.shape[0])
        h[stop:, start:stop] = h[start:stop, stop:].t()
