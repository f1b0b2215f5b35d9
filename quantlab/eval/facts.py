"""What the result file says about the two models and the machine, read from headers, digests and the system.

Knows nothing about scores.
"""

import hashlib
import math
import platform
import re
from functools import cache
from pathlib import Path

import torch
import transformers

import quantlab.models
import quantlab_kernels
from quantlab.checkpoint.folder import read_json_object
from quantlab.checkpoint.hf import open_checkpoint
from quantlab.checkpoint.inspection import ModuleRow, inspect_folder
from quantlab.errors import CheckpointError
from quantlab.eval.result import LayerError, Machine, ModelFacts
from quantlab.schemes import describe

REPORT_FILE = "quantlab_report.json"
FLOATS = {16: "16-bit", 32: "32-bit"}


def model_facts(folder: Path, tokenizer: str) -> ModelFacts:
    """The facts of the model in `folder`, whose tokenizer has that digest; reads all of its weights once.

    Raises CheckpointError for tensors that do not fit the format.
    """
    found = inspect_folder(folder)
    if found.problems:
        raise CheckpointError(f"the format is not sound: {found.problems[0]}")
    weights = sum(math.prod(row.shape) for row in found.modules)
    return ModelFacts(
        path=str(folder),
        architecture=found.architecture,
        scheme=" + ".join(sorted({_stored(row) for row in found.modules}, reverse=True)),
        bits_per_weight=8 * sum(row.bytes for row in found.modules) / weights,
        bytes=found.file_bytes,
        weights=open_checkpoint(folder, allow_quantized=True).weights_digest(),
        tokenizer=tokenizer,
    )


def machine(device: torch.device) -> Machine:
    """This machine, as figures depend on it."""
    return Machine(
        device=device_name(device),
        torch=str(torch.__version__),
        transformers=str(transformers.__version__),
        threads=torch.get_num_threads(),
    )


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or `cpu` with the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({_processor()})"


@cache
def runtime_version() -> str:
    """Our version with a digest of the code that runs models, which changes between versions in a source tree."""
    found = hashlib.sha256()
    for package in (quantlab.models, quantlab_kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder).as_posix()}\0".encode() + path.read_bytes())
    return f"{quantlab.__version__} {found.hexdigest()[:16]}"


def layer_errors(folder: Path) -> tuple[LayerError, ...]:
    """Each linear's relative output error as the quantizer measured it; none for a folder without its report.

    Raises CheckpointError for a report that is not what the quantizer writes.
    """
    path = folder / REPORT_FILE
    if not path.exists():
        return ()
    rows = read_json_object(path, folder).get("modules")
    try:
        return tuple(LayerError(module=row["name"], error=row["error"]) for row in rows)  # type: ignore[attr-defined]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError("is not a report of quantlab quantize", where=str(path), fix="remove it") from error


def _stored(row: ModuleRow) -> str:
    return FLOATS.get(row.bits, f"{row.bits}-bit") if row.scheme is None else describe(row.scheme)


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine()
