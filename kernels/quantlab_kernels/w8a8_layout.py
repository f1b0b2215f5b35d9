"""An INT8 weight as the W8A8 kernels read it: plain rows of codes, a float32 scale each. Knows nothing about files."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab_kernels.layout import QuantizedWeight


@dataclass(frozen=True, slots=True)
class W8A8Weight:
    """A weight [N, K]: codes [N, K] int8 and scales [N] float32, both contiguous."""

    codes: Tensor
    scales: Tensor

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads of it."""
        return self.codes.nbytes + self.scales.nbytes


def to_w8a8(q: QuantizedWeight) -> W8A8Weight:
    """`q`, a symmetric weight of 8-bit codes with one scale a row, for the W8A8 kernels; runs where `q` is.

    Ends only when the device has finished, since kernels may read weights before the launches ahead of them are done.
    Raises ValueError for zero points, for groups, and for scales that are not finite.
    """
    if q.zeros is not None or q.scales.shape[1] != 1:
        raise ValueError("W8A8 kernels take symmetric weights with one scale a row")
    scales = q.scales[:, 0].float().contiguous()
    if not torch.isfinite(scales).all():
        raise ValueError("scales must be finite")
    weight = W8A8Weight(q.codes.contiguous(), scales)
    if q.codes.is_cuda:
        torch.cuda.synchronize(q.codes.device)
    return weight
