"""Checks of `quantlab quantize` that need neither torch nor the weights, so that a mistake costs a second.

Writes nothing. Knows nothing about how the work is done.
"""

import json
import os
import re
import shutil
from pathlib import Path

from quantlab.checkpoint.hf import HFCheckpoint, open_checkpoint
from quantlab.errors import CalibrationError, OutputError, UsageError
from quantlab.models.config import ModelConfig
from quantlab.quant.options import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, CalibrationSpec
from quantlab.quant.plan import has_gpu
from quantlab.quant.work import published_by
from quantlab.recipe import Recipe
from quantlab.recipe_file import builtin, for_quality, load_recipe, regroup
from quantlab.schemes import SchemeName
from quantlab.units import human_bytes

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
READABLE = (".txt", ".jsonl", ".parquet")
FILE_SUFFIXES = (*READABLE, ".json", ".md", ".csv", ".gz", ".zst", ".zip")


def open_source(model: Path) -> tuple[HFCheckpoint, ModelConfig]:
    """The 16-bit checkpoint in `model` and its configuration; raises CheckpointError or UnsupportedModel."""
    checkpoint = open_checkpoint(model)
    return checkpoint, ModelConfig.from_json(checkpoint.config, str(model / "config.json"))


def choose_recipe(
    recipe: str | None, scheme: SchemeName | None, quality: str | None, group_size: str | None, symmetric: bool | None
) -> Recipe:
    """The recipe that the options name; raises UsageError or RecipeError."""
    group = int(group_size) if group_size and group_size != "channel" else group_size
    if recipe is None:
        return for_quality(scheme or "w4a16", quality or "balanced", group, symmetric)  # type: ignore[arg-type]
    for option, value in (("--scheme", scheme), ("--quality", quality)):
        if value is not None:
            raise UsageError(f"--recipe says it all already: leave out {option}", where=option)
    return regroup(_named_recipe(recipe), group, symmetric)  # type: ignore[arg-type]


def _named_recipe(recipe: str) -> Recipe:
    is_file = Path(recipe).exists() or os.sep in recipe or recipe.endswith((".yaml", ".yml"))
    return load_recipe(Path(recipe)) if is_file else builtin(recipe)


def calibration_spec(
    recipe: Recipe, config: ModelConfig, source: tuple[str | None, str | None, str | None], samples: int | None,
    seq_len: int | None, seed: int,
) -> CalibrationSpec:  # fmt: skip
    """Calibration as asked, or by default; `source` is (path or id, split, field), `samples` 0 means all.

    Raises CalibrationError for a path that is not there, UsageError for blocks longer than the model's context.
    """
    path, split, field = source
    limit = config.max_position_embeddings
    if seq_len is not None and seq_len > limit:
        raise UsageError(f"{seq_len} tokens are more than the model's {limit}", where="--seq-len")
    if path is not None:
        _check_text(path)
    elif split or field:
        raise UsageError("--split and --field choose inside --calibration, which is missing", where="--calibration")
    wants_all = samples == 0 or (samples is None and any(step.kind == "distill" for step in recipe.passes))
    blocks = None if wants_all else samples or DEFAULT_SAMPLES
    return CalibrationSpec(path, split, field, blocks, seq_len or min(DEFAULT_SEQ_LEN, limit), seed)


def _check_text(path: str) -> None:
    """Raises CalibrationError for a path that is not there or is of a kind that cannot be read."""
    local = path.startswith((".", "/", "~")) or path.endswith(FILE_SUFFIXES) or not DATASET_ID.fullmatch(path)
    if not Path(path).exists():
        if local:
            fix = "leave --calibration out for the bundled text"
            raise CalibrationError("no such file or folder", where=path, fix=fix)
    elif Path(path).is_file() and Path(path).suffix not in READABLE:
        raise CalibrationError(f"is not a {', '.join(READABLE)} file or a folder of them", where=path)


def check_device(device: str) -> None:
    """Raises UsageError if a GPU is asked for on a machine without one (asking torch would cost seconds)."""
    if device.startswith("cuda") and not has_gpu():
        raise UsageError(f"'{device}' needs a GPU, and this machine has none", where="--device", fix="quantlab doctor")


def check_out(source: Path, out: Path, force: bool, restart: bool = False) -> None:
    """Raises OutputError if `out` cannot be made, or UsageError if it would touch the source.

    An `out` that exists is let through with `force`, or where a run that put it in place was cut off before it could
    tidy up: whether it was this very run is for the run to find out.
    """
    here, there = source.resolve(), out.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise UsageError(f"'{out}' and the source '{source}' must lie apart", where="--out")
    if out.name in ("", ".."):  # the work folder is named after it, and lies beside it
        raise UsageError(f"'{out}' does not name a folder to make", where="--out", fix="--out ./NAME")
    if out.exists() or out.is_symlink():
        if not force and (restart or published_by(out) is None):
            raise OutputError("exists already", where=str(out), fix="another --out, or --force to replace it")
        if force and not _is_replaceable(out):
            raise OutputError("is not a checkpoint folder, so --force will not remove it", where=str(out))
    _check_writable(_existing_parent(there))


def check_folder(folder: Path) -> None:
    """Raises OutputError if nothing can be written into `folder`, which may exist."""
    there = folder.resolve()
    _check_writable(there if there.exists() else _existing_parent(there))


def _check_writable(parent: Path) -> None:
    if not parent.is_dir():
        raise OutputError("is a file, so no folder can be made in it", where=str(parent))
    if not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise OutputError("cannot be written", where=str(parent), fix="choose an --out folder that you may write to")


def check_space(out: Path, needed: int) -> None:
    """Raises OutputError if fewer than `needed` bytes are free where `out` will be."""
    parent = _existing_parent(out.resolve())
    free = shutil.disk_usage(parent).free
    if free < needed:
        message = f"needs {human_bytes(needed)} and has {human_bytes(free)} free"
        raise OutputError(message, where=str(parent), fix="free some space, or choose another --out")


def _is_replaceable(out: Path) -> bool:
    """Whether --force may remove `out`: an empty folder or a quantized checkpoint, never somebody's home."""
    if out.is_symlink() or not out.is_dir():
        return False
    if not any(out.iterdir()):
        return True
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "quantization_config" in config


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent
