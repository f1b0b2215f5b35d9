"""A report on the terminal: its tables, then the verdict, where a long output leaves the eye.

Colours only repeat what the words say. Knows nothing about files.
"""

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from quantlab.eval.reports.tables import Table, cost_table, gate_table, task_table
from quantlab.eval.reports.words import one_line, verdict_sentence, verdict_word
from quantlab.eval.result import Report

STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
MAX_ROWS = 200


def show(report: Report, console: Console) -> None:
    """Print `report` on `console`."""
    console.print(_title(report))
    for table in (cost_table(report), task_table(report), gate_table(report)):
        if table is not None:
            console.print()
            console.print(drawn(table.first(MAX_ROWS)))
    console.print()
    console.print(_verdict(report))


def _title(report: Report) -> Text:
    candidate, baseline = one_line(report.candidate.path), one_line(report.baseline.path)
    return Text.assemble((candidate, "bold"), f"  {one_line(report.candidate.scheme)}, against ", (baseline, "bold"))


def _verdict(report: Report) -> Text:
    style = STYLES[report.gate.verdict] if report.gate else "cyan"
    return Text.assemble((verdict_word(report), f"bold {style}"), "  ", verdict_sentence(report))


def drawn(table: Table) -> RichTable:
    """A table for a console."""
    view = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(table.columns):
        number = index >= len(table.columns) - table.numbers
        view.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for index, row in enumerate(table.rows):
        style = STYLES[table.verdicts[index]] if table.verdicts else ""
        view.add_row(Text(row[0], style), *(Text(cell) for cell in row[1:]))
    if table.note:
        view.caption = Text(table.note, "dim")
        view.caption_justify = "left"
    return view
