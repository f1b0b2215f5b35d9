"""What a checkpoint folder holds, as plain values: bits and bytes of every linear, and whether the format is right.

Imports no torch; `quantlab inspect` prints this. Knows nothing about terminals.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.header import TensorInfo
from quantlab.checkpoint.model_folder import ModelFolder, open_model
from quantlab.models.naming import linear_shapes, tensor_shapes
from quantlab.schemes import Scheme

MAX_PROBLEMS = 100
WEIGHT_PARTS = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
FLOAT_BITS = {"F32": 32, "BF16": 16, "F16": 16}


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One linear: `scheme` None if it is stored as a float, `bytes` of everything that stands for its weight."""

    name: str
    scheme: Scheme | None
    bits: int
    shape: tuple[int, int]
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for one weight, scales and zero points included."""
        return 8 * self.bytes / math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A folder's contents. Sizes are bytes on disk; `other_bytes` are embedding, norms and biases."""

    folder: Path
    architecture: str
    modules: tuple[ModuleRow, ...]
    parameters: int
    tensor_bytes: int
    file_bytes: int
    other_bytes: int
    problems: tuple[str, ...]

    @property
    def quantized(self) -> tuple[ModuleRow, ...]:
        """The linears that a scheme covers."""
        return tuple(row for row in self.modules if row.scheme is not None)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Mean bits per weight over the quantized linears, None if there are none."""
        weights = sum(math.prod(row.shape) for row in self.quantized)
        return 8 * sum(row.bytes for row in self.quantized) / weights if weights else None

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per parameter over the whole model, embedding included."""
        return 8 * self.tensor_bytes / self.parameters


def inspect_folder(folder: Path) -> Inspection:
    """What `folder` (16-bit or packed) holds; tensors that do not fit the format are told in `problems`.

    Raises CheckpointError or UnsupportedModel when the folder cannot be opened at all.
    """
    model = open_model(folder, check=False)
    tensors = model.checkpoint.tensors
    rows = tuple(_row(name, shape, model.schemes[name], tensors) for name, shape in linear_shapes(model.config).items())
    tensor_bytes = sum(info.nbytes for info in tensors.values())
    return Inspection(
        folder=folder,
        architecture=model.config.architecture,
        modules=rows,
        parameters=sum(math.prod(shape) for shape in tensor_shapes(model.config).values()),
        tensor_bytes=tensor_bytes,
        file_bytes=sum(path.stat().st_size for path in model.checkpoint.files),
        other_bytes=tensor_bytes - sum(row.bytes for row in rows),
        problems=_problems(model),
    )


def _row(name: str, shape: tuple[int, int], scheme: Scheme | None, tensors: Mapping[str, TensorInfo]) -> ModuleRow:
    parts = [tensors[f"{name}.{part}"] for part in WEIGHT_PARTS if f"{name}.{part}" in tensors]
    stored = FLOAT_BITS.get(parts[0].dtype, 0) if parts else 0
    return ModuleRow(name, scheme, scheme.bits if scheme else stored, shape, sum(part.nbytes for part in parts))


def _problems(model: ModelFolder) -> tuple[str, ...]:
    """The first problems, each one line without its error code."""
    found = itertools.islice(model.tensor_problems(), MAX_PROBLEMS)
    return tuple(f"{problem.where}: {problem.message}" for problem in found)
