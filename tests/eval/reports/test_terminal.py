"""A report on the terminal: the verdict in words, whole lines when piped, and no control characters."""

import io

import pytest
from rich.console import Console

from quantlab.eval.reports.tables import cost_table, task_table
from quantlab.eval.reports.terminal import show
from quantlab.eval.result import Report
from tests.eval.reports.hostile import hostile_report, huge_report


def shown(report: Report, width: int = 160, color: bool = False) -> str:
    """What a terminal of `width` columns gets."""
    console = Console(file=io.StringIO(), width=width, force_terminal=color, highlight=False)
    show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_verdict_comes_last_where_the_eye_is(report: Report) -> None:
    text = shown(report)
    assert text.index("size") < text.index("lambada_openai") < text.index("ppl_ratio")
    assert text.splitlines()[-1].startswith("FAIL  1 of 3 requirements is missed")


def test_every_row_is_one_line_when_piped(report: Report) -> None:
    lines = shown(report).splitlines()
    tasks = task_table(report)
    assert tasks is not None
    for row in [*cost_table(report).rows, *tasks.rows]:
        assert any(all(cell in line for cell in row) for line in lines), row


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_gets_everything_within_its_width(width: int, report: Report) -> None:
    lines = shown(report, width).splitlines()
    assert max(len(line) for line in lines) <= width


def test_measurements_without_a_verdict_say_so(bare: Report) -> None:
    assert "MEASURED  No gate was applied" in shown(bare)


def test_hostile_text_cannot_drive_the_terminal() -> None:
    text = shown(hostile_report())
    assert all(c == "\n" or c.isprintable() for c in text)
    assert r"\x1b[2J" in text
    assert "\x1b[2J" not in shown(hostile_report(), color=True)


def test_a_huge_report_ends() -> None:
    text = shown(huge_report())
    assert "more rows are in report.json" in text and len(text.splitlines()) < 5000
