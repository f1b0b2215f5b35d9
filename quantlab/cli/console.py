"""Consoles and number formats that every command shares: data on stdout, messages on stderr.

Knows nothing about what is shown.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160  # rich would fold a table at 80 columns, and grep would miss the rest


def data_console() -> Console:
    """A console for results."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def plain_table(*columns: str, numbers: int = 0, header: bool = True) -> Table:
    """A table without lines; the last `numbers` of `columns` are aligned right. Without a header: names and values."""
    table = Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index >= len(columns) - numbers else "left", overflow="fold")
    if not columns:
        table.add_column(style="dim")
        table.add_column(overflow="fold")
    return table


def print_json(value: Any) -> None:
    """`value` as one line of JSON on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def human_bytes(size: float) -> str:
    """`5.23 MB`: three digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_count(count: float) -> str:
    """`1.24B`: three digits, for parameters and tokens."""
    for unit in ("", "k", "M", "B"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def human_seconds(seconds: float) -> str:
    """`0.4s`, `42s`, `3m 07s`, `2h 05m`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
