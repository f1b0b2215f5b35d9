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
    """Sums over the tokens of one input: `hessian: [K, K]` of x x^T and `absmax: [K]`, fp32; `tokens` seen."""

    hessian: Tensor
    absmax: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device | str) -> "Moments":
        """No tokens seen, for inputs of `features` channels."""
        return cls(torch.zeros(features, features, device=device), torch.zeros(features, device=device))

    def add(self, x: Tensor) -> None:
        """Count in x: [T, K] fp32."""
        add_outer(self.hessian, x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.tokens += len(x)

    def finish(self) -> None:
        """Mirror the upper tiles and divide by the token count: `hessian` becomes the mean of x x^T."""
        mirror_upper(self.hessian)
        self.hessian /= max(1, self.tokens)


def add_outer(h: Tensor, x: Tensor) -> None:
    """Add the upper tiles of X^T X to `h: [K, K]`; x: [T, K]; about half of the full product's work for large K."""
    features = h.shape[0]
    xt = x.t()
    for start in range(0, features, TILE):
        stop = min(start + TILE, features)
        h[start:stop, start:].addmm_(xt[start:stop], x[:, start:])


def mirror_upper(h: Tensor) -> None:
    """Copy the upper triangle of `h: [K, K]` onto the lower one, in place."""
    for start in range(0, h.shape[0], TILE):
        stop = min(start + TILE, h.shape[0])
        h[stop:, start:stop] = h[start:stop, stop:].t()
