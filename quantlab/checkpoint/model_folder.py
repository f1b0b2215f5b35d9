"""A checkpoint folder understood as a model: its architecture, the scheme of each linear, every tensor accounted for.

One door for 16-bit sources and for packed outputs. Imports no torch and reads headers only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.hf import HFCheckpoint, open_checkpoint
from quantlab.checkpoint.schema import parse_quantization_config
from quantlab.checkpoint.sizes import disk_entries
from quantlab.errors import CheckpointError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import linear_shapes, tensor_shapes
from quantlab.schemes import Scheme

SCALE_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checkpoint, its architecture, and the scheme of every linear (None: stored as a float)."""

    checkpoint: HFCheckpoint
    config: ModelConfig
    schemes: dict[str, Scheme | None]

    def tensor_problems(self) -> Iterator[CheckpointError]:
        """Every tensor that is missing, superfluous, or not of the dtype and shape that the schemes imply."""
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, tuple[str, ...]] = {}
        for name, shape in tensor_shapes(self.config).items():
            module = name.removesuffix(".weight")
            scheme = self.schemes.get(module) if module != name else None
            if scheme is None:
                shapes[name] = shape
                continue
            rows, columns = shape
            for entry, dtype, entry_shape in disk_entries(module, (rows, columns), scheme, "BF16"):
                shapes[entry] = entry_shape
                dtypes[entry] = SCALE_DTYPES if entry.endswith("_scale") else (dtype,)
        yield from self.checkpoint.tensor_problems(shapes, dtypes)


def open_model(folder: Path, *, check: bool = True) -> ModelFolder:
    """The model in `folder`, 16-bit or packed.

    Raises CheckpointError or UnsupportedModel as `open_checkpoint` does, for a quantization_config that does not fit
    the architecture, and (with `check`) for the first of `tensor_problems`.
    """
    checkpoint = open_checkpoint(folder, allow_quantized=True)
    where = str(folder / "config.json")
    config = ModelConfig.from_json(checkpoint.config, where)
    model = ModelFolder(checkpoint, config, _schemes(checkpoint.config, linear_shapes(config), where))
    if check:
        for problem in model.tensor_problems():
            raise problem
    return model


def _schemes(raw: Mapping[str, object], linears: Mapping[str, tuple[int, int]], where: str) -> dict[str, Scheme | None]:
    """The scheme of each of `linears`, once its group size divides its columns."""
    section = raw.get("quantization_config")
    if not section:
        return dict.fromkeys(linears)
    if not isinstance(section, dict):
        raise CheckpointError("quantization_config is not a table", where=where)
    schemes = parse_quantization_config(section, linears, where)
    for module, (_, columns) in linears.items():
        scheme = schemes[module]
        if scheme is not None and scheme.group_size is not None and columns % scheme.group_size:
            message = f"{columns} columns of {module} do not divide into groups of {scheme.group_size}"
            raise CheckpointError(message, where=f"{where}: quantization_config")
    return schemes
