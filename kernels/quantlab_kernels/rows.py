"""Rows of activations with room behind them, which the copy engine of Hopper may read.

A tile is wider than its last tokens are many, and the engine takes about 2.7 ns for each row past the end of a tensor,
which it fills with zeros: on an H200 tiles 256 wide take a quarter longer with 192 tokens than with 256. Rows that lie
in the tensor's own storage are simply read; what they hold reaches only sums that nobody stores. So activations that
feed linears are made with `empty_rows`, and a linear's launch reads as far as the storage goes. Any other tensor is
right as well, only slower. Knows nothing about kernels.
"""

import torch
from torch import Tensor

SMALLEST, LARGEST = 8, 256


def padded(tokens: int) -> int:
    """`tokens` rounded up to how wide tiles are: a power of two from 8, beyond 256 a multiple of that."""
    if tokens > LARGEST:
        return -(-tokens // LARGEST) * LARGEST
    return max(SMALLEST, 1 << (tokens - 1).bit_length()) if tokens else 0


def empty_rows(tokens: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized [tokens, columns], contiguous, with `padded(tokens)` rows of storage."""
    return torch.empty(padded(tokens), columns, dtype=dtype, device=device)[:tokens]


def readable_rows(x: Tensor, width: int) -> int:
    """Rows of contiguous x [M, K] and its storage behind it, up to M rounded up to a multiple of `width`."""
    wanted = -(-x.shape[0] // width) * width
    stored = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return max(x.shape[0], min(wanted, stored // x.shape[1]))
