"""`quantlab report`: the result of an evaluation shown again, rendered anew or judged by another gate, unmeasured.

Knows nothing about how a report is drawn, nor about tests.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from quantlab.cli.console import data_console, plain_table, print_json
from quantlab.cli.evaluate import EXIT_CODES
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.errors import printable

if TYPE_CHECKING:
    from quantlab.eval.comparison import Change

EXAMPLES = (
    ("quantlab report ./evaluation", "the verdict and the tables, from report.json"),
    ("quantlab report ./evaluation/report.json --out ./pages", "the web page, the summary and junit.xml anew"),
    ("quantlab report ./evaluation --gate gate.yaml", "what another gate says of the same measurements"),
    ("quantlab report ./evaluation --against ./evaluation-before", "this candidate beside an earlier one"),
    ("quantlab report --schema > report.schema.json", "what report.json holds, for scripts"),
)
app = typer.Typer()


def print_schema(asked: bool) -> None:
    """Print the JSON Schema and end the command, if asked to."""
    from quantlab.eval.reports.schema import schema

    if asked:
        sys.stdout.write(schema())
        raise typer.Exit


@app.command("report", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    result: Annotated[
        Path,
        typer.Argument(metavar="DIR|FILE", help="A report.json, or the folder that holds one.", show_default=False),
    ],
    gate: Annotated[
        str | None,
        typer.Option("--gate", metavar="FILE|NAME", help="Judge by this gate instead.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="DIR|FILE", help="Show the figures of another result beside these."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the files to write.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the checked result as one JSON object, with --against the changes too."),
    ] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", is_eager=True, callback=print_schema, help="Print the JSON Schema of report.json."),
    ] = False,
) -> None:
    """Show the result of an evaluation again, write its pages anew, or judge it by another gate.

    Measures nothing. Succeeds whatever the verdict was; with --gate it exits as eval does: 0, 10 or 11.
    """
    from quantlab.eval.comparison import compare_reports
    from quantlab.eval.gate import judge
    from quantlab.eval.gate_file import find_gate
    from quantlab.eval.reports.files import read_report, write_reports
    from quantlab.eval.reports.terminal import show

    report = read_report(result)
    if gate is not None:
        verdict = judge(find_gate(gate), report.texts, report.tasks, report.noise)
        report = report.model_copy(update={"gate": verdict})
    changes = compare_reports(read_report(against), report) if against else []
    written = write_reports(report, out) if out else []
    if as_json:
        told = report.model_dump(mode="json")
        print_json({"report": told, "changes": [asdict(change) for change in changes]} if against else told)
    else:
        console = data_console()
        show(report, console)
        if changes:
            console.print(changes_table(changes))
        for path in written:
            console.print(f"written  {path}", markup=False)
    if gate is not None and report.gate is not None:
        raise typer.Exit(EXIT_CODES[report.gate.verdict])


def changes_table(changes: "Sequence[Change]") -> Table:
    """The figures of two results side by side."""
    table = plain_table("text or task", "figure", "before", "now", "change", numbers=3)
    for change in changes:
        before, after = (f"{value:.{change.digits}f}" for value in (change.before, change.after))
        difference = f"{change.after - change.before:+.{change.digits}f}"
        table.add_row(escape(printable(change.where)), escape(printable(change.figure)), before, after, difference)
    return table
