"""Output files, written so that they appear whole or not at all.

Everything goes to a temporary folder, is flushed to the disk, and is renamed into place last. Knows nothing about
what the tensors mean.
"""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.header import open_regular
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.checkpoint.sizes import Entry, Shard, json_bytes
from quantlab.errors import OutputError

COPY_CHUNK = 1 << 22
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space (--dry-run says how much is needed) and run it again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space (--dry-run says how much is needed) and run it again"),
    errno.EFBIG: ("the file is over this system's size limit", "pass a smaller --max-shard-size"),
    errno.EACCES: ("no permission to write here", "choose an --out folder that you may write to"),
    errno.EPERM: ("no permission to write here", "choose an --out folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose an --out folder on a writable disk"),
    errno.EEXIST: ("exists already", "remove it, or choose another --out folder"),
    errno.ENOTEMPTY: ("exists already", "pass --force to replace it, or choose another --out folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another --out folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter --out folder"),
    errno.EXDEV: ("lies on another disk than its temporary folder", "choose an --out folder that is not a mount point"),
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a failed write to `path` into an OutputError that says why and what to do."""
    try:
        yield
    except OSError as error:
        reason, fix = _REASONS.get(error.errno or 0, (f"cannot be written: {error.strerror}", None))
        raise OutputError(reason, where=str(path), fix=fix) from error


def write_shard(path: Path, shard: Shard, tensor: Callable[[str], Tensor]) -> None:
    """Writes `shard` to `path`, one tensor in memory at a time; `tensor` is asked once for each name, in file order.

    Raises OutputError if the disk refuses, AssertionError if a tensor is not what the shard's header says.
    """
    with new_file(path) as file:
        file.write(shard.header)
        for entry in shard.entries:
            _write_all(file, _data(entry, tensor(entry[0])))


def write_json(path: Path, value: object) -> None:
    """Writes `value` as `sizes.json_bytes` renders it; raises OutputError."""
    write_bytes(path, json_bytes(value))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a new file that holds `content`; raises OutputError."""
    with new_file(path) as file:
        _write_all(file, memoryview(content))


def copy_file(source: Path, target: Path) -> None:
    """Copies bytes, nothing else: no links, no modes, no times. Raises CheckpointError or OutputError."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as reader, new_file(target) as writer:
        while chunk := reader.read(COPY_CHUNK):
            _write_all(writer, memoryview(chunk))


@contextmanager
def new_file(path: Path) -> Iterator[io.FileIO]:
    """A file that must not exist yet, on the disk (not only in the page cache) when the block ends."""
    with disk_errors(path), io.FileIO(path, "xb") as file:
        yield file
        os.fsync(file.fileno())


def publish(tmp: Path, final: Path, force: bool) -> None:
    """Renames the finished folder `tmp` to `final` (same parent), durably.

    An existing `final` is refused unless `force`; then it is moved aside, next to `tmp`, and removed only when the new
    one stands; what a run that was cut off in between has moved there is removed too.
    Raises OutputError, leaving the old `final` in place.
    """
    sync_tree(tmp)
    old = tmp.with_name(f"{tmp.name}.replaced")
    replaces = final.exists() or final.is_symlink()
    with disk_errors(final):
        if replaces:
            if not force:
                raise OSError(errno.ENOTEMPTY, "exists")
            if old.exists() or old.is_symlink():
                remove_tree(old)
            os.rename(final, old)
        try:
            os.rename(tmp, final)
        except OSError:
            if replaces:
                os.rename(old, final)
            raise
        sync_folder(final.parent)
        if replaces:
            remove_tree(old)


def sync_tree(folder: Path) -> None:
    """Flushes the names (not the contents) of `folder` and the folders in it to the disk."""
    for root, _, _ in os.walk(folder):
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names to the disk, so that a rename survives a power cut."""
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Removes a folder, a file or a link (never what the link points at)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _data(entry: Entry, tensor: Tensor) -> memoryview:
    """The bytes of `tensor`, which must be what `entry` announces."""
    name, dtype, shape = entry
    found = (tensor.dtype, tuple(tensor.shape))
    assert found == (TORCH_DTYPES[dtype], shape), f"{name}: planned {dtype} {shape}, got {found}"
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes all of `data`: one write() is capped near 2 GiB by the kernel, and may be short on a full disk."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])
