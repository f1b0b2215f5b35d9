"""The summary as a Markdown renderer shows it: whole tables, and text from outside as it is."""

import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from quantlab.eval.reports.markdown import WORD_JOINER, escaped, markdown
from quantlab.eval.reports.tables import cost_table, gate_table, provenance, task_table
from quantlab.eval.reports.words import one_line
from quantlab.eval.result import Report
from tests.eval.reports.hostile import ATTACK, hostile_report, huge_report


class Page(HTMLParser):
    """Tags, and the cells of each table row, of some HTML."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def rendered(text: str) -> Page:
    """`text` as a GitHub-like renderer shows it; raw HTML is allowed, as there."""
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


@pytest.mark.parametrize("which", ["report", "passing", "undecided", "bare"])
def test_every_cell_of_every_table_is_shown(which: str, request: pytest.FixtureRequest) -> None:
    report: Report = request.getfixturevalue(which)
    tables = [gate_table(report), cost_table(report), task_table(report), provenance(report)]
    wanted = [cells for table in tables if table for cells in [table.columns, *table.rows]]
    shown = rendered(markdown(report)).rows
    assert [len(row) for row in shown] == [len(row) for row in wanted]
    for row, cells in zip(shown, wanted, strict=True):
        assert row[1:] == list(cells[1:]) and row[0].endswith(cells[0])


def test_the_verdict_is_the_heading(report: Report, passing: Report, undecided: Report, bare: Report) -> None:
    words = [markdown(each).splitlines()[0] for each in (report, passing, undecided, bare)]
    assert [word.split(":")[0].split()[-1] for word in words] == ["FAIL", "PASS", "INCONCLUSIVE", "MEASURED"]


def test_hostile_text_shows_as_it_is() -> None:
    page = rendered(markdown(hostile_report()))
    plain = {"h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "sub", "details", "summary"}
    assert set(page.tags) <= plain and not page.links
    shown = [cell.replace(WORD_JOINER, "") for row in page.rows for cell in row]
    assert one_line(ATTACK) in shown


def test_nothing_is_linked_or_mentioned() -> None:
    text = escaped("@admin #42 www.evil.example https://evil.example :tada: a@b.c")
    assert not re.search(r"@\w|#\d|www\.|https:/|:tada", text)
    assert rendered(text.replace(WORD_JOINER, "")).tags == ["p"]


def test_a_huge_report_fits_a_step_summary() -> None:
    assert len(markdown(huge_report()).encode()) < 1_000_000
