"""Calibration documents from wherever the user keeps them: text, JSON lines, Parquet, a folder, a dataset id.

Knows nothing about tokens or blocks: `quant.data` packs what this yields.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from pyarrow import parquet

from quantlab.bundled import bundled_text
from quantlab.errors import CalibrationError

Document = str | list[dict[str, str]]  # plain text, or the messages of one chat
SUFFIXES = (".txt", ".jsonl", ".parquet")
KINDS = f"a {', '.join(SUFFIXES)} file, a folder of them, or a dataset id"
DEFAULT_FIELDS = ("messages", "text")
MAX_FILE_CHARS = 1 << 26  # of one .txt file; about what `quant.data` takes at most
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


def is_streamed(source: str | None) -> bool:
    """Whether `source` names a dataset on the hub rather than something on this machine."""
    return source is not None and not Path(source).exists()


def read_documents(source: str | None, split: str | None, field: str | None) -> Iterator[Document]:
    """The documents of `source` in a fixed order, read as they are asked for.

    `source` is a file, a folder or a dataset id (`owner/name` or `owner/name:config`); None is the bundled text.
    `field` is the column that holds the text or the chat; by default "messages", then "text". Raises CalibrationError.
    """
    if source is None:
        file = bundled_text("calibration")
        if file is None:
            raise CalibrationError("the bundled calibration text is missing", where="bundled", fix="--calibration FILE")
        return _read_file(file, field)
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, field)
    if path.exists():
        return _read_file(path, field)
    if path.suffix in SUFFIXES or not DATASET_ID.fullmatch(source):
        raise CalibrationError("no such file, folder or dataset id", where=source)
    return _read_dataset(source, split or "train", field)


def _read_folder(folder: Path, field: str | None) -> Iterator[Document]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise CalibrationError(f"the folder holds no {', '.join(SUFFIXES)} file", where=str(folder))
    for path in files:
        yield from _read_file(path, field)


def _read_file(path: Path, field: str | None) -> Iterator[Document]:
    if path.suffix not in SUFFIXES:
        raise CalibrationError(f"cannot read {path.suffix or 'a file without a suffix'}", where=str(path), fix=KINDS)
    try:
        if path.suffix == ".txt":
            yield _read_text(path)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, field)
        else:
            yield from _read_parquet(path, field)
    except UnicodeDecodeError as error:
        raise CalibrationError("not UTF-8 text", where=str(path), fix="convert it with iconv -t UTF-8") from error
    except OSError as error:
        raise CalibrationError(error.strerror or str(error), where=str(path)) from error


def _read_text(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.read(MAX_FILE_CHARS)


def _read_jsonl(path: Path, field: str | None) -> Iterator[Document]:
    # Binary lines end at \n alone; text mode or splitlines() would also break inside rows at U+2028.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield _document(_json_row(line, where), field, where)


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"not a line of JSON: {error}", where=where) from error
    if not isinstance(row, dict):
        raise CalibrationError("each line must be a JSON object", where=where)
    return row


def _read_parquet(path: Path, field: str | None) -> Iterator[Document]:
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = _pick_field(names, field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for row in batch.to_pylist():
                    yield _document(row, column, str(path))
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"not a readable Parquet file: {error}", where=str(path)) from error


def _read_dataset(source: str, split: str, field: str | None) -> Iterator[Document]:
    name, _, config = source.partition(":")
    try:
        for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
            yield _document(row, field, source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CalibrationError(
            f"cannot stream split {split!r}: {reason}", where=source, fix="a local file with --calibration PATH"
        ) from error


def _document(row: dict[str, Any], field: str | None, where: str) -> Document:
    name = _pick_field(list(row), field, where)
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise CalibrationError(f"field {name!r} is neither text nor a list of role/content messages", where=where)


def _pick_field(names: list[str], field: str | None, where: str) -> str:
    for name in (field,) if field else DEFAULT_FIELDS:
        if name in names:
            return name
    wanted = f"field {field!r}" if field else "field 'text' or 'messages'"
    raise CalibrationError(f"no {wanted}; there is: {', '.join(names[:20])}", where=where, fix="--field NAME")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
