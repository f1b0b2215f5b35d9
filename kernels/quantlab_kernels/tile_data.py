"""Measured tiles as data: for a GPU and a weight's shape, the fastest tile by number of tokens, in a JSON file.

Knows nothing about what a tile means; each kernel's own module says that.
"""

import json
from bisect import bisect_left
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

Tile = TypeVar("Tile")


class TileData(Generic[Tile]):
    """The tiles in the file `path`, each a dataclass among `kinds`, which has them by the names that the file uses."""

    def __init__(self, path: Path, kinds: dict[str, type[Tile]]):
        self.path, self.kinds = path, kinds

    @cache  # noqa: B019 - one object a file, made when its module is imported
    def tiles(self, path: Path | None = None) -> dict[tuple[str, int, int], list[tuple[int, Tile]]]:
        """(GPU, N, K) -> (tokens, the fastest tile for that many), ascending, of the data file or of another one."""
        found = {}
        for entry in json.loads((path or self.path).read_text()):
            rows = [(tokens, self.from_json(tile)) for tokens, tile in entry["tiles"]]
            found[entry["gpu"], entry["rows"], entry["columns"]] = sorted(rows, key=lambda row: row[0])
        return found

    def tile(self, gpu: str, rows: int, columns: int, tokens: int) -> Tile | None:
        """The tile measured for this many tokens or the next larger number; None if neither was measured."""
        entries = self.tiles().get((gpu, rows, columns), [])
        at = bisect_left([count for count, _ in entries], tokens)
        return entries[at][1] if at < len(entries) else None

    def to_json(self, tile: Tile) -> dict[str, Any]:
        """A tile as the data file has it."""
        kind = next(name for name, cls in self.kinds.items() if isinstance(tile, cls))
        return {"kernel": kind, **asdict(tile)}  # type: ignore[call-overload]

    def from_json(self, fields: dict[str, Any]) -> Tile:
        """The inverse of `to_json`."""
        return self.kinds[fields["kernel"]](**{name: value for name, value in fields.items() if name != "kernel"})
