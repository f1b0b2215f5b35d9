"""Compiles W4A16 kernels before they are needed: for this machine's GPU or, without any GPU, for a given one.

A product is described by numbers alone (`Product`), so that worker processes can compile it from a description, and a
later launch of that product finds the result in Triton's cache. Knows nothing about models.
"""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from quantlab_kernels.w4a16 import prepare
from quantlab_kernels.w4a16_layout import COLUMNS, PADDED_COLUMNS, ROWS, W4A16Weight
from quantlab_kernels.w4a16_tiles import Tile


@dataclass(frozen=True, slots=True)
class Product:
    """One kind of launch: the weight's shape and kind, tokens, tile, and whether it may start early."""

    rows: int
    columns: int
    tokens: int
    tile: Tile
    dtype: torch.dtype = torch.bfloat16
    group_size: int = 128
    zeros: bool = False
    bias: bool = False
    early: bool = True
    bits: int = 4


class OfflineDriver:
    """Stands in for a GPU's driver where there is none: Triton asks it what to compile for, and nothing runs."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """A number for each kind of GPU, since Triton asks for the target of a device only once."""
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def is_active(self) -> bool:
        """Always."""
        return True


def compile_product(product: Product) -> Any:
    """The compiled kernel of `product` for the active driver's GPU; nothing is launched."""
    weight = _empty_weight(product)
    x = torch.empty(product.tokens, product.columns, dtype=product.dtype)
    out = torch.empty(product.tokens, product.rows, dtype=product.dtype)
    bias = torch.empty(product.rows, dtype=product.dtype) if product.bias else None
    kernel, grid, arguments, options = prepare(x, weight, bias, out, product.tile, product.early)
    return kernel.warmup(*arguments, grid=grid, **options)


def compile_in_parallel(products: Iterable[Product], capability: int, workers: int) -> dict[Product, str]:
    """Compile `products` in worker processes into Triton's cache; returns what failed, with the reason."""
    jobs = list(products)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_go_offline, initargs=(capability,)) as pool:
        reasons = pool.map(_reason, jobs)
        return {job: reason for job, reason in zip(jobs, reasons, strict=True) if reason}


def _go_offline(capability: int) -> None:
    triton.runtime.driver.set_active(OfflineDriver(capability))


def _reason(product: Product) -> str:
    """Why a product does not compile, or nothing."""
    try:
        compile_product(product)
    except Exception as error:  # whatever Triton raises: the caller decides what a failure means
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return ""


def _empty_weight(product: Product) -> W4A16Weight:
    blocks = -(-product.rows // ROWS)
    columns = -(-product.columns // PADDED_COLUMNS) * PADDED_COLUMNS
    words = torch.empty(blocks * columns // COLUMNS * 4 * product.bits, COLUMNS, dtype=torch.int16)
    scales = torch.empty(blocks, columns // product.group_size, 8, 4, 2, dtype=product.dtype)
    zeros = torch.empty_like(scales, dtype=torch.int16) if product.zeros else None
    return W4A16Weight(words, scales, zeros, 0, product.rows, product.columns, product.group_size, product.bits)
