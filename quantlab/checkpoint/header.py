"""Safetensors headers, read by hand and believed only when every number in them fits the file.

Checkpoints come from strangers, and the tool that reads one copies parts of it into a file that is published: an
offset that is not checked leaks memory or another tensor's bytes. Accepts less than the safetensors library does:
no duplicate names, no odd characters in names, bounded sizes and counts. Knows nothing about torch or models.
"""

import io
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from quantlab.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 500_000
MAX_DIMS = 8
MAX_DIM = 2**31 - 1
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,511}")
DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes `start` to `end` of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, in the order of its data.

    Raises CheckpointError, naming the file and the tensor, unless the tensors fill the file without hole or overlap.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = _header_text(file, size, path)
    entries = _entries(parse_json(text, f"{path}: header"), path)
    begin = 8 + len(text)
    infos = [_tensor_info(name, entry, begin, size, path) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    _check_cover(infos, begin, size, path)
    return {info.name: info for info in infos}


def open_regular(path: Path) -> io.FileIO:
    """`path` opened for reading, unbuffered by python; raises CheckpointError unless it is a regular file."""
    try:
        # O_NONBLOCK: a named pipe posing as a shard must not hang the open.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("is not a regular file", where=str(path))
    return io.FileIO(descriptor, "rb")


def parse_json(text: bytes, where: str) -> object:
    """JSON without duplicate keys, NaN or absurd nesting; raises CheckpointError that names `where`."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"key {_short(twice)} appears twice", where=where)
        return result

    def refuse(constant: str) -> NoReturn:
        raise CheckpointError(f"holds {constant}, which is not JSON", where=where)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise CheckpointError("is nested too deeply", where=where) from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise CheckpointError(f"is not valid JSON: {_short(str(error), 120)}", where=where) from error


def _header_text(file: io.FileIO, size: int, path: Path) -> bytes:
    """The header's JSON bytes, once the length before them fits the file."""
    where = str(path)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"is truncated: {size} bytes cannot hold a safetensors header", where=where)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header of {length} bytes is over the limit of {MAX_HEADER_BYTES}", where=where)
    if length > size - 8:
        raise CheckpointError(f"is truncated: header of {length} bytes in a file of {size}", where=where)
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise CheckpointError("is not a safetensors file: its header is not a JSON object", where=where)
    return text


def _entries(header: object, path: Path) -> dict[str, object]:
    """The header's tensor entries, without its metadata."""
    assert isinstance(header, dict)  # the text starts with "{"
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("header: __metadata__ is not a table of strings", where=str(path))
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"header names {len(header)} tensors; the limit is {MAX_TENSORS}", where=str(path))
    return header


def _tensor_info(name: str, entry: object, begin: int, size: int, path: Path) -> TensorInfo:
    """One header entry, checked on its own; `begin` is where data starts, `size` the file's."""
    where = f"{path}: tensor {_short(name)}"
    if not TENSOR_NAME.fullmatch(name):
        raise CheckpointError("name has characters other than letters, digits, '_', '-' and '.'", where=where)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("entry must hold exactly dtype, shape and data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"unknown dtype {_short(str(dtype))}", where=where)
    if not _naturals(shape) or len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
        raise CheckpointError(f"shape {_short(str(shape))} is not at most {MAX_DIMS} sane sizes", where=where)
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"data_offsets {_short(str(offsets))} are not two byte positions", where=where)
    start, end = offsets
    if not start <= end <= size - begin:
        raise CheckpointError(f"bytes {start}..{end} lie outside the {size - begin} bytes of data", where=where)
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - start != expected:
        raise CheckpointError(f"{end - start} bytes for {dtype} {shape}, which needs {expected}", where=where)
    return TensorInfo(name, dtype, tuple(shape), begin + start, begin + end, path)


def _check_cover(infos: list[TensorInfo], begin: int, size: int, path: Path) -> None:
    """Refuses data that no tensor or more than one tensor owns; `infos` come sorted by position."""
    position = begin
    for info in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise CheckpointError(f"{what} at byte {info.start}", where=f"{path}: tensor {info.name}")
        position = info.end
    if position != size:
        raise CheckpointError(f"{size - position} bytes after the last tensor", where=str(path))


def _naturals(value: object) -> bool:
    """Whether `value` is a list of non-negative integers (bool is an int in python, not here)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(text: str, limit: int = 80) -> str:
    """`text`, cut to `limit` characters for a one-line message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
