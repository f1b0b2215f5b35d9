"""Task files on disk: lm-evaluation-harness's YAML, read as data, with the places of its data files checked.

A file may name Python functions (`!function`); those are code and are refused unless the user allows it. Knows nothing
about what a task asks or how it is scored.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api import metrics as _registered  # noqa: F401  importing it fills the registry
from lm_eval.api.registry import metric_registry
from lm_eval.tasks._yaml_loader import load_yaml

from quantlab import yaml_tree
from quantlab.errors import UsageError, did_you_mean
from quantlab.yaml_tree import Kind

MAX_INCLUDES = 8
SUFFIX = ".yaml"
SUFFIXES = (SUFFIX, ".yml")  # of the user's files
# What `datasets` reads from local files without running or unpickling anything.
LOCAL_FORMATS = ("json", "text", "csv", "parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Keys by which a file asks for code that is not beside it, and that no flag allows.
FOREIGN_CODE = {
    "hf_evaluate": "a metric whose code comes from the Hugging Face hub",
    "unsafe_code": "running what the model writes",
    "use_prompt": "prompts of the promptsource package",
}


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One file: the name of its task or group, where it lies, and what it says."""

    name: str
    path: Path
    config: Mapping[str, Any]

    @property
    def members(self) -> Sequence[Any] | None:
        """The tasks of a group, None for a task."""
        return self.config["task"] if "group" in self.config else None


def bundled_folder() -> Path:
    """The folder of bundled task files: inside an installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_suites"
    return shipped if shipped.is_dir() else package.parent / "suites"


@cache
def bundled_names() -> tuple[str, ...]:
    """Names of the bundled tasks and suites, sorted."""
    return tuple(sorted(path.stem for path in bundled_folder().glob(f"*{SUFFIX}")))


def find_files(task_dir: Path | None, allow_code: bool) -> dict[str, TaskFile]:
    """The bundled task files by name, and those in `task_dir`, which go first."""
    found = {name: read_task_file(bundled_folder() / f"{name}{SUFFIX}", False) for name in bundled_names()}
    if task_dir is None:
        return found
    if not task_dir.is_dir():
        raise UsageError("there is no such folder", where=f"--task-dir {task_dir}")
    for path in sorted(path for path in task_dir.iterdir() if path.suffix in SUFFIXES):
        file = read_task_file(path, allow_code)
        found[file.name] = file
    return found


def read_task_file(path: Path, allow_code: bool) -> TaskFile:
    """The task or group in one file; raises UsageError for what is neither, and for code that is not allowed."""
    config = _read(path, allow_code, ())
    name = config.get("group", config.get("task"))
    if not isinstance(name, str) or not name:
        raise UsageError("names neither a task nor a group", where=str(path), fix="a key such as 'task: my_task'")
    if "group" in config and not isinstance(config.get("task"), list):
        raise UsageError("a group lists its tasks under 'task:'", where=str(path))
    return TaskFile(name, path, config)


def check_sources(file: TaskFile) -> None:
    """Raises UsageError where a task asks for code from elsewhere, or for data in a format that may hold code."""
    for key, what in FOREIGN_CODE.items():
        if any(mapping.get(key) for mapping in _mappings(file.config)):
            raise UsageError(f"asks for {what}, which quantlab does not run", where=f"{file.path}: {key}")
    for entry in file.config.get("metric_list") or []:
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        # A name that the harness does not know it would look up as a script, on the disk and on the hub.
        own = callable(metric) or callable(file.config.get("process_results"))
        if not own and metric not in metric_registry:
            known = did_you_mean(str(metric), sorted(metric_registry))
            raise UsageError(f"unknown metric '{metric}'{known}", where=f"{file.path}: metric_list")
    source = file.config.get("dataset_path")
    if source is None or source in LOCAL_FORMATS or callable(file.config.get("custom_dataset")):
        return
    if not HUB_NAME.fullmatch(str(source)) or Path(str(source)).exists():
        known = did_you_mean(str(source), LOCAL_FORMATS)
        raise UsageError(
            f"dataset_path is neither a local format nor owner/name on the hub{known}", where=str(file.path)
        )


def locate_data(file: TaskFile, task_dir: Path | None) -> dict[str, list[Path]] | None:
    """The data files of each split of a task with local data, None for one whose data are on the hub.

    Looked for in `task_dir`, then beside the task file, and never outside the two. Raises UsageError.
    """
    if file.config.get("dataset_path") not in LOCAL_FORMATS:
        return None
    named = (file.config.get("dataset_kwargs") or {}).get("data_files")
    splits = named if isinstance(named, dict) else {"train": named}
    folders = [folder for folder in (task_dir, file.path.parent) if folder is not None]
    return {
        str(split): [_locate(name, folders, file) for name in _listed(names, file)] for split, names in splits.items()
    }


def _listed(names: Any, file: TaskFile) -> list[str]:
    listed = names if isinstance(names, list) else [names]
    if not listed or not all(isinstance(name, str) and name for name in listed):
        raise UsageError("dataset_kwargs needs data_files, such as {test: items.jsonl}", where=str(file.path))
    return listed


def _locate(name: str, folders: Sequence[Path], file: TaskFile) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
        message = f"the data file '{name}' must be a path inside --task-dir or the task file's own folder"
        raise UsageError(message, where=str(file.path))
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).resolve()
    looked = " nor ".join(str(folder) for folder in folders if folder != bundled_folder())
    missing = f"'{name}' is not in {looked}" if looked else f"the task '{file.name}' needs its data, '{name}'"
    raise UsageError(missing, where=f"--tasks {file.name}", fix=f"--task-dir with the folder that holds {name}")


def _read(path: Path, allow_code: bool, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a file and those that it includes say; later words win."""
    kind = Kind("task", "task and doc_to_text", UsageError, bundled_names, None, None)
    text = yaml_tree.read_text(path, kind)
    if place := _code(text):
        if not allow_code:
            message = "names Python code (!function), which would run with your rights"
            raise UsageError(message, where=f"{path}:{place}", fix="--allow-task-code, if you trust this folder")
        return _load_code(path)
    config = yaml_tree.parse(text, str(path), kind).data
    included = config.pop("include", [])
    if path in above or len(above) >= MAX_INCLUDES:
        raise UsageError("files include each other without end", where=str(path))
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _read(path.parent / str(name), allow_code, (*above, path))
    return merged | config


def _load_code(path: Path) -> dict[str, Any]:
    """The harness's own reading of a file that names functions, which imports them."""
    try:
        return dict(load_yaml(path))
    except Exception as error:  # whatever the user's own Python raises
        raise UsageError(f"its code cannot be loaded: {_first_line(error)}", where=str(path)) from error


def _first_line(error: Exception) -> str:
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {told[0]}" if told else type(error).__name__


def _code(text: str) -> str | None:
    """Line and column of the first tag that makes the harness import something; None if there is none."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if tag is not None and tag.startswith("!"):
                return f"{event.start_mark.line + 1}:{event.start_mark.column + 1}"
    except yaml.YAMLError:
        return None  # the reader that follows says where and why
    return None


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A tree's mappings, at any depth."""
    if isinstance(value, Mapping):
        yield value
    for child in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _mappings(child)
