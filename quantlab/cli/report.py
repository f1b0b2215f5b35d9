"""`quantlab report`: shows the result of an evaluation again, or writes its pages anew, without measuring anything.

Knows nothing about how a report is drawn.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.console import data_console, print_json
from quantlab.cli.examples import SETTINGS, epilog

EXAMPLES = (
    ("quantlab report ./evaluation", "the verdict and the tables, from report.json"),
    ("quantlab report ./evaluation/report.json --out ./pages", "the web page, the summary and junit.xml anew"),
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
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the files to write.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checked result as one JSON object.")] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", is_eager=True, callback=print_schema, help="Print the JSON Schema of report.json."),
    ] = False,
) -> None:
    """Show the result of an evaluation again, or write its pages anew. Succeeds whatever the verdict was."""
    from quantlab.eval.reports.files import read_report, write_reports
    from quantlab.eval.reports.terminal import show

    report = read_report(result)
    written = write_reports(report, out) if out else []
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    console = data_console()
    show(report, console)
    for path in written:
        console.print(f"written  {path}", markup=False)
