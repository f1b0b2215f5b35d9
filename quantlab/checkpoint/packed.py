"""A quantized weight as the tensors of a file, and back: a change of container, never of a code or a scale.

The tensors are those of the compressed-tensors `pack-quantized` and `int-quantized` layouts; `sizes.disk_entries` is
the torch-free list of the same. Knows nothing about files; whoever calls reads and writes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.checkpoint.reader import all_finite
from quantlab.errors import CheckpointError
from quantlab.schemes import Scheme
from quantlab_kernels import layout
from quantlab_kernels.layout import QuantizedWeight

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PACK = {4: layout.pack_int4, 8: layout.pack_int8}
_UNPACK = {4: layout.unpack_int4, 8: layout.unpack_int8}
_PACK_ZEROS = {4: layout.pack_zeros, 8: layout.pack_zeros8}
_UNPACK_ZEROS = {4: layout.unpack_zeros, 8: layout.unpack_zeros8}


def disk_tensors(module: str, q: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that stand for `module`'s weight in a file, by full name.

    q.codes must lie within the scheme's range; q.zeros is present exactly when the scheme is asymmetric.
    """
    assert (q.zeros is None) == scheme.symmetric
    assert q.group_size == (scheme.group_size or q.codes.shape[1])
    assert not scheme.quantizes_activations or (scheme.symmetric and scheme.group_size is None)
    scale = {f"{module}.weight_scale": q.scales.contiguous()}
    if scheme.quantizes_activations:
        return {f"{module}.weight": q.codes.contiguous()} | scale
    tensors = {f"{module}.weight_packed": _PACK[scheme.bits](q.codes)} | scale
    tensors[f"{module}.weight_shape"] = torch.tensor(q.codes.shape, dtype=torch.int64)
    if q.zeros is not None:
        tensors[f"{module}.weight_zero_point"] = _PACK_ZEROS[scheme.bits](q.zeros)
    return tensors


def from_disk(module: str, scheme: Scheme, shape: tuple[int, int], tensor: Callable[[str], Tensor]) -> QuantizedWeight:
    """The inverse of `disk_tensors`: `module`'s weight of `shape` (N, K), from tensors read by full name.

    Raises CheckpointError, naming the tensor, for a wrong dtype or shape and for scales that are zero or not finite.
    """
    rows, columns = shape
    if scheme.group_size is not None and columns % scheme.group_size:
        message = f"{columns} columns do not divide into groups of {scheme.group_size}"
        raise CheckpointError(message, where=f"tensor {module}.weight_packed")
    groups, per_word = scheme.groups(columns), 32 // scheme.bits
    scales = _checked(f"{module}.weight_scale", SCALE_DTYPES, (rows, groups), tensor)
    if not all_finite(scales) or bool((scales == 0).any()):
        raise CheckpointError("holds a scale that is zero, NaN or Inf", where=f"tensor {module}.weight_scale")
    zeros = None
    if scheme.quantizes_activations:
        codes = _checked(f"{module}.weight", (torch.int8,), (rows, columns), tensor)
    else:
        words = _checked(f"{module}.weight_packed", (torch.int32,), (rows, -(-columns // per_word)), tensor)
        codes = _UNPACK[scheme.bits](words, columns)
        _check_stated_shape(module, shape, tensor)
        if not scheme.symmetric:
            zero_shape = (-(-rows // per_word), groups)
            packed = _checked(f"{module}.weight_zero_point", (torch.int32,), zero_shape, tensor)
            zeros = _UNPACK_ZEROS[scheme.bits](packed, rows)
    return QuantizedWeight(codes, scales, zeros, scheme.group_size or columns)


def _check_stated_shape(module: str, shape: tuple[int, int], tensor: Callable[[str], Tensor]) -> None:
    """weight_shape is what other readers cut the padding by, so it must say what config.json implies."""
    name = f"{module}.weight_shape"
    stated = _checked(name, (torch.int64, torch.int32), (2,), tensor).tolist()
    if stated != list(shape):
        raise CheckpointError(f"says {stated}; config.json asks for {list(shape)}", where=f"tensor {name}")


def _checked(
    name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], tensor: Callable[[str], Tensor]
) -> Tensor:
    """The tensor `name`, once its dtype and shape are what the layout asks for."""
    value = tensor(name)
    if value.dtype not in dtypes or tuple(value.shape) != shape:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise CheckpointError(f"is {found}; the scheme asks for {expected} {list(shape)}", where=f"tensor {name}")
    return value
