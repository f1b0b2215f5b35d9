"""The items of tasks with local data: JSON lines into the tables that the harness works on.

Knows nothing about prompts, metrics or where a file was found.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from quantlab.errors import UsageError

MAX_BYTES = 1 << 31
Loader = Callable[..., Mapping[str, datasets.Dataset]]


def read_items(path: Path) -> list[dict[str, Any]]:
    """One JSON object from each line that is not empty; raises UsageError with the line of what is none.

    Lines end at line feeds alone: U+2028 and its like occur inside items.
    """
    items = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(item, dict):
            raise UsageError("an item is a JSON object, such as {...}", where=f"{path}:{number}")
        items.append(item)
    if not items:
        raise UsageError("the file holds no items", where=str(path))
    return items


def loader(splits: Mapping[str, Sequence[Path]]) -> Loader:
    """What the harness calls for a task's data: the JSON lines of each split's files end to end."""
    tables = {split: _table(paths) for split, paths in splits.items()}
    return lambda **_: tables  # the harness hands over the task's metadata, which choose nothing here


def _table(paths: Sequence[Path]) -> datasets.Dataset:
    items = [item for path in paths for item in read_items(path)]
    keys = items[0].keys()
    for number, item in enumerate(items, start=1):
        if item.keys() != keys:
            missing = sorted(keys ^ item.keys())
            raise UsageError(
                f"item {number} and the first differ in their keys: {', '.join(missing)}", where=str(paths[0])
            )
    try:
        return datasets.Dataset.from_list(items)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"the items' values do not fit one table: {reason}", where=str(paths[0])) from error


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"larger than {MAX_BYTES:,} bytes", where=str(path))
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
