"""A linear layer as the engine runs it: one call, and one line that says which kernel does it.

Holds the layers that any device runs; each device's module adds those with kernels of its own. Knows nothing about
files or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Activations quantized per token where they were made: codes [T, K] int8, scales [T] fp32."""

    codes: Tensor
    scales: Tensor


Activations = Tensor | Int8Rows


class Linear(Protocol):
    """y = x W^T + b. `takes_int8`: it would rather have its input as Int8Rows."""

    takes_int8: ClassVar[bool]

    @property
    def kernel(self) -> str:
        """What computes it, for people."""

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias that one call reads."""

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N] in the activations' dtype."""


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A weight [N, K] in the dtype of the activations, through torch's own product."""

    takes_int8: ClassVar[bool] = False
    weight: Tensor
    bias: Tensor | None
    kernel: str

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return bytes_of(self.weight, self.bias)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, Tensor)
        return linear(x, self.weight, self.bias)


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of those that are there."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Layers of different kinds that read one input, their outputs one after the other."""

    takes_int8: ClassVar[bool] = False
    parts: tuple[Linear, ...]

    @property
    def kernel(self) -> str:
        """The parts' kernels."""
        return " | ".join(dict.fromkeys(part.kernel for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: Activations) -> Tensor:
        """x: [T, K] -> [T, N of all parts]."""
        return torch.cat([part(x) for part in self.parts], dim=1)


@dataclass(frozen=True, slots=True)
class RawLinear:
    """A linear as read from a file: `weight` is [N, K] floating, or codes with a scheme."""

    weight: Tensor | QuantizedWeight
    scheme: Scheme | None
    bias: Tensor | None


class MakeLinear(Protocol):
    """A device's choice of a kernel."""

    def __call__(self, raw: RawLinear) -> Linear:
        """The layer that runs `raw`, whose tensors lie on the device, floats in the activations' dtype."""


def fuse(parts: Sequence[RawLinear], make: MakeLinear) -> Linear:
    """One layer for linears that read the same input; several side by side where their schemes or biases differ."""
    same = len({part.scheme for part in parts}) == 1 and len({part.bias is None for part in parts}) == 1
    if len(parts) == 1:
        return make(parts[0])
    weights = [part.weight for part in parts]
    codes = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if not same or len({code.scales.dtype for code in codes}) > 1:
        return SideBySide(tuple(make(part) for part in parts))
    biases = [part.bias for part in parts if part.bias is not None]
    whole = fuse_rows(codes) if codes else torch.cat(dense)
    return make(RawLinear(whole, parts[0].scheme, torch.cat(biases) if biases else None))


def fuse_rows(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of several of one scheme, their rows one after the other."""
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    codes, scales = (torch.cat([getattr(weight, name) for weight in weights]) for name in ("codes", "scales"))
    return QuantizedWeight(codes, scales, torch.cat(zeros) if zeros else None, weights[0].group_size)
