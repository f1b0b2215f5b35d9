"""`quantlab doctor`: what this machine has, what each missing piece costs, and the command that fixes it.

Knows nothing about how things are probed.
"""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from quantlab import __version__
from quantlab.cli.console import data_console, print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.machine import Finding, examine
from quantlab.errors import MissingExtra

EXAMPLES = (
    ("quantlab doctor", "a table, most basic first"),
    ("quantlab doctor --json", "the same for a script or a bug report"),
)
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "missing": "[red]missing[/red]"}
app = typer.Typer()


@app.command("doctor", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Show what this machine has, what each missing piece costs, and the command that fixes it."""
    findings = examine()
    if as_json:
        print_json({"quantlab": __version__, "findings": [asdict(finding) for finding in findings]})
    else:
        show(findings)
    missing = [finding.name for finding in findings if finding.status == "missing"]
    if missing:
        fix = next(finding.fix for finding in findings if finding.status == "missing")
        raise MissingExtra(f"cannot quantize without {', '.join(missing)}", fix=fix)


def show(findings: list[Finding]) -> None:
    """The findings as a table on stdout."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(MARKS[finding.status], finding.name, escape(finding.found))
        if finding.cost:
            table.add_row("", "", f"[dim]costs[/dim] {escape(finding.cost)}")
        if finding.fix:
            table.add_row("", "", f"[dim]fix[/dim]   {escape(finding.fix)}")
    data_console().print(table)
