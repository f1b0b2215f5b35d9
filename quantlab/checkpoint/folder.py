"""What a checkpoint folder may hold: JSON of bounded size, links that stay inside, and no pickles.

Knows nothing about tensors or torch.
"""

import os
import re
from pathlib import Path

from quantlab.checkpoint.header import open_regular, parse_json
from quantlab.errors import CheckpointError

MAX_JSON_BYTES = 200_000_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# How the hub's download cache links a snapshot's file to its content.
HUB_LINK = re.compile(r"(\.\./){2,3}blobs/[0-9a-f]{40,64}")


def read_json_object(path: Path, folder: Path) -> dict[str, object]:
    """The JSON object in `path`, a file of `folder`; raises CheckpointError for anything else."""
    check_link(path, folder)
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"is over the limit of {MAX_JSON_BYTES} bytes", where=str(path))
        value = parse_json(file.readall(), str(path))
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return value


def check_link(path: Path, folder: Path) -> None:
    """Raises CheckpointError if `path` is a link that leaves `folder`, save into the hub cache's blobs."""
    if not path.is_symlink():
        return
    target = os.readlink(path)
    root, real = folder.resolve(), Path(os.path.realpath(path))
    if real.is_relative_to(root):
        return
    blobs = root.parent.parent / "blobs"
    if root.parent.name == "snapshots" and HUB_LINK.fullmatch(target) and real.parent == blobs:
        return
    raise CheckpointError(f"is a link that leaves the folder (to {target[:120]})", where=str(path))


def is_packed(config: dict[str, object]) -> str | None:
    """The quantization method that config.json states, or None for a 16-bit checkpoint."""
    section = config.get("quantization_config") or config.get("compression_config")
    if not section:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else None
    return str(method or "unknown method")[:40]


def pickle_files(folder: Path) -> list[str]:
    """Names of the folder's files that look like pickled weights."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
