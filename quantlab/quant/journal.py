"""The journal of a run: what is finished, durably, so that the same command can continue after any kind of end.

A folder beside the output holds `journal.jsonl` (one line a finished step, the first a fingerprint of the inputs) and
one file of tensors for each step. A line is written only after its tensors are on the disk, so whatever a line says
is there. Knows nothing about what the steps mean.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from quantlab.checkpoint.header import DTYPE_BYTES, read_header
from quantlab.checkpoint.reader import TORCH_DTYPES, read_tensor
from quantlab.checkpoint.sizes import plan_shards
from quantlab.checkpoint.writer import disk_errors, remove_tree, sync_folder, write_shard
from quantlab.errors import OutputError, ResumeMismatch
from quantlab.quant.work import JOURNAL, LOCK

SAFETENSORS_DTYPES = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items() if name in DTYPE_BYTES}


class Journal:
    """Finished steps by name, in `folder`."""

    def __init__(self, folder: Path, entries: dict[str, dict[str, Any]]):
        self.folder = folder
        self.entries = entries

    def record(self, step: str, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Make `step` durable: its tensors first, then the line that says so."""
        self.write_tensors(step, tensors)
        self.note(step, facts)

    def note(self, step: str, facts: dict[str, Any]) -> None:
        """Make a step without tensors durable."""
        _append(self.folder / JOURNAL, {"step": step, **facts})
        self.entries[step] = facts

    def write_tensors(self, step: str, tensors: Mapping[str, Tensor]) -> None:
        """Write or replace the tensors of `step`, whole or not at all."""
        entries = [(name, SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
        (shard,) = plan_shards(entries, 1 << 62)
        unfinished = self.folder / f"{step}.unfinished"
        with disk_errors(unfinished):
            unfinished.unlink(missing_ok=True)
        write_shard(unfinished, shard, lambda name: tensors[name])
        with disk_errors(self.folder):
            os.replace(unfinished, self.path(step))
            sync_folder(self.folder)

    def tensors(self, step: str) -> dict[str, Tensor]:
        """All tensors of a finished step."""
        return {name: read_tensor(info) for name, info in read_header(self.path(step)).items()}

    def path(self, step: str) -> Path:
        """The file that holds the tensors of `step`."""
        return self.folder / f"{step}.safetensors"

    def remove(self) -> None:
        """Delete the folder, the journal last, since it says what the rest is: the run is over."""
        _clear(self.folder, (LOCK, JOURNAL))
        _clear(self.folder)
        with disk_errors(self.folder):
            remove_tree(self.folder)


@contextmanager
def open_journal(folder: Path, fingerprint: dict[str, str], restart: bool) -> Iterator[Journal]:
    """The journal in `folder`, new or continued, held by this process alone until the block ends.

    Raises ResumeMismatch naming what has changed since the journal was begun, OutputError if another run holds it.
    A journal without a finished step is removed again when the block ends with an error.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115  held open: closing it drops the lock
    with lock:
        _lock(lock.fileno(), folder)
        if restart:
            with disk_errors(folder):
                (folder / JOURNAL).unlink(missing_ok=True)  # first: a line must never outlive its tensors
        entries = _read(folder / JOURNAL)
        begun = entries.pop("fingerprint", None)
        if begun is None:
            _clear(folder)
            entries = {}
            _append(folder / JOURNAL, {"step": "fingerprint", **fingerprint})
        elif begun != fingerprint:
            raise _mismatch(folder, begun, fingerprint)
        journal = Journal(folder, entries)
        try:
            yield journal
        except BaseException:
            if not journal.entries:
                remove_tree(folder)
            raise


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = "another run is writing this output"
        raise OutputError(message, where=str(folder), fix="wait for it, or another --out") from error


def _clear(folder: Path, spare: tuple[str, ...] = (LOCK,)) -> None:
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.name not in spare:
                remove_tree(path)


def _mismatch(folder: Path, begun: dict[str, str], now: dict[str, str]) -> ResumeMismatch:
    changed = [key for key in {**begun, **now} if begun.get(key) != now.get(key)]
    message = f"an unfinished run is here, and since it began these have changed: {', '.join(changed)}"
    return ResumeMismatch(message, where=str(folder), fix="--restart to drop it and begin anew")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished steps by name; a last line that was cut off by the run's end is not one."""
    if not path.exists():
        return {}
    entries: dict[str, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            entries[entry.pop("step")] = entry
        except (ValueError, KeyError, AttributeError) as error:
            fix = "--restart to drop it and begin anew"
            raise ResumeMismatch("the journal is damaged", where=str(path), fix=fix) from error
    if whole != text:
        with disk_errors(path):
            os.truncate(path, len(whole.encode()))
    return entries


def _append(path: Path, entry: dict[str, Any]) -> None:
    with disk_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
