"""The baseline's outcomes on tasks, kept on disk, so that a second candidate needs no second run of the baseline.

An entry is one JSON file named after the digest of everything that it depends on, written whole or not at all, with a
digest of what it says; one that is not exactly that is no entry. Knows nothing about candidates, nor how an item is
answered.
"""

import os
from pathlib import Path

from pydantic import ValidationError

from quantlab.checkpoint.folder import read_json_object
from quantlab.checkpoint.writer import disk_errors, write_json
from quantlab.errors import CheckpointError, OutputError
from quantlab.eval.outcomes import TaskOutcome
from quantlab.eval.protocol import digest
from quantlab.eval.result import Digest, Strict, TaskNoise


class TaskKey(Strict):
    """What an entry depends on; `machine` because other kernels, and other rows in a batch, round otherwise."""

    weights: Digest
    tokenizer: Digest
    data: Digest  # of the items, their prompts, the metric and the harness's version
    dtype: str
    machine: str

    def file(self, cache: Path) -> Path:
        """Where its entry is."""
        return cache / "tasks" / f"{digest(self.model_dump())[:40]}.json"


class TaskEntry(Strict):
    """The baseline on one task, and how many of its answers flip by noise alone."""

    key: TaskKey
    outcome: TaskOutcome
    noise: TaskNoise


class Kept(Strict):
    """An entry as it lies on disk: without its digest, a changed answer would look like any other."""

    entry: TaskEntry
    contents: Digest  # of the entry as canonical JSON


def load_entry(cache: Path, key: TaskKey) -> TaskEntry | None:
    """The entry for `key`, or None if there is none or it is damaged."""
    file = key.file(cache)
    try:
        kept = Kept.model_validate(read_json_object(file, file.parent))
    except (CheckpointError, ValidationError, OSError):
        return None
    entry = kept.entry
    if kept.contents != digest(entry.model_dump(mode="json")):
        return None
    return entry if entry.key == key and entry.outcome.data == key.data else None


def store_entry(cache: Path, entry: TaskEntry) -> None:
    """Keep `entry`, in the place of any before it; raises OutputError if the disk refuses."""
    file = entry.key.file(cache)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            staging.unlink(missing_ok=True)
        kept = Kept(entry=entry, contents=digest(entry.model_dump(mode="json")))
        write_json(staging, kept.model_dump(mode="json"))
        with disk_errors(file):
            os.replace(staging, file)
    except OutputError as error:
        staging.unlink(missing_ok=True)
        raise OutputError(error.message, where=str(file), fix="--cache DIR on another disk, or --no-cache") from error
