"""`quantlab inspect`: what a checkpoint folder holds, 16-bit or packed, from its headers.

Knows nothing about the format; `checkpoint.inspection` does.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from quantlab.checkpoint.inspection import Inspection, ModuleRow, inspect_folder
from quantlab.cli.console import data_console, plain_table, print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.errors import CheckpointError, printable
from quantlab.schemes import describe
from quantlab.units import human_bytes, human_count

EXAMPLES = (
    ("quantlab inspect ./Llama-3.2-1B-w4a16", "bits, sizes, and whether the format is sound"),
    ("quantlab inspect ./Llama-3.2-1B-w4a16 --modules", "one row a module"),
    ("quantlab inspect ./Llama-3.2-1B --json", "a 16-bit checkpoint, for a script"),
)
app = typer.Typer()


@app.command("inspect", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    modules: Annotated[bool, typer.Option("--modules", help="One row a module, not one a kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show what a checkpoint holds: bits and bytes of each module, effective bits per weight, format check."""
    found = inspect_folder(folder)
    if as_json:
        print_json(as_dict(found))
    else:
        show(found, modules)
    if found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise CheckpointError(f"the format is not sound: {found.problems[0]}{more}")


def as_dict(found: Inspection) -> dict[str, Any]:
    """An inspection as plain values; sizes in bytes."""
    return {
        "folder": str(found.folder),
        "architecture": found.architecture,
        "parameters": found.parameters,
        "file_bytes": found.file_bytes,
        "tensor_bytes": found.tensor_bytes,
        "other_bytes": found.other_bytes,
        "bits_per_weight": found.bits_per_weight,
        "quantized_bits_per_weight": found.quantized_bits_per_weight,
        "modules": [_module(row) for row in found.modules],
        "problems": list(found.problems),
    }


def show(found: Inspection, each: bool) -> None:
    """An inspection as tables on stdout."""
    console = data_console()
    title = f"{found.architecture}, {human_count(found.parameters)} parameters"
    console.print(f"[bold]{escape(str(found.folder))}[/bold]  {escape(printable(title))}")
    totals = plain_table(header=False)
    totals.add_row("weights on disk", f"{found.file_bytes:,} bytes ({human_bytes(found.file_bytes)})")
    totals.add_row("quantized", f"{len(found.quantized)} of {len(found.modules)} linear modules")
    bits = found.quantized_bits_per_weight
    of_those = "" if bits is None else f"; {bits:.3f} in the quantized modules"
    totals.add_row("bits per weight", f"{found.bits_per_weight:.3f} over the whole model{of_those}")
    totals.add_row("format", f"[red]{len(found.problems)} problems[/red]" if found.problems else "[green]sound[/green]")
    console.print(totals)
    console.print(_table(found, each))
    for problem in found.problems:
        console.print(f"[red]problem[/red]  {escape(printable(problem))}")


def _module(row: ModuleRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "scheme": describe(row.scheme),
        "quantized": row.scheme is not None,
        "bits": row.bits,
        "shape": list(row.shape),
        "bytes": row.bytes,
        "bits_per_weight": row.bits_per_weight,
    }


def _table(found: Inspection, each: bool) -> Table:
    """One row for each kind of module that is stored alike, or for each module."""
    groups: dict[tuple[str, tuple[int, int], str], list[ModuleRow]] = {}
    for row in found.modules:
        layered = row.name.startswith("model.layers.") and not each
        kind = row.name.split(".", 3)[3] if layered else row.name
        stored = describe(row.scheme) if row.scheme or row.bits == 16 else f"{row.bits}-bit"
        groups.setdefault((kind, row.shape, stored), []).append(row)
    table = plain_table("module", "stored as", "count", "shape", "bits/weight", "bytes", numbers=4)
    for (kind, shape, stored), rows in groups.items():
        size = sum(row.bytes for row in rows)
        bits = 8 * size / (len(rows) * math.prod(shape))
        table.add_row(kind, stored, str(len(rows)), f"{shape[0]} x {shape[1]}", f"{bits:.3f}", human_bytes(size))
    table.add_row("embedding, norms, biases", "as they were", "", "", "", human_bytes(found.other_bytes))
    return table
