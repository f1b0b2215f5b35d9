"""Consoles and tables that every command shares: data on stdout, messages on stderr.

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
