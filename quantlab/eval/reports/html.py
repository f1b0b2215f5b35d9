"""A report as one HTML page that needs nothing else: no script, no font, no network.

The page forbids itself everything but its own style sheet (Content-Security-Policy), so that even text that got past
the escaping could not load or run anything. Knows nothing about files.
"""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from quantlab.eval.reports.elements import Markup, element, join
from quantlab.eval.reports.tables import Table, cost_table, gate_table, provenance, task_table
from quantlab.eval.reports.words import one_line, verdict_sentence, verdict_word
from quantlab.eval.result import Report

MAX_ROWS = 300


def html(report: Report) -> str:
    """The whole page."""
    title = f"{verdict_word(report)}: {one_line(report.candidate.path)} against {one_line(report.baseline.path)}"
    body = element("main", None, _banner(report), *_sections(report))
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, _head(title), element('body', None, body))}\n"


@cache
def style() -> str:
    """The style sheet."""
    return files("quantlab.eval.reports").joinpath("report.css").read_text(encoding="utf-8")


def _head(title: str) -> Markup:
    digest = b64encode(sha256(style().encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, title),
        element("style", None, Markup(style())),
    )


def _banner(report: Report) -> Markup:
    verdict = report.gate.verdict if report.gate else "none"
    return element(
        "header",
        {"class": f"banner {verdict}"},
        element("h1", None, verdict_word(report)),
        element("p", None, verdict_sentence(report)),
    )


def _sections(report: Report) -> list[Markup]:
    tables = (gate_table(report), cost_table(report), task_table(report), provenance(report))
    return [_section(table.first(MAX_ROWS)) for table in tables if table is not None]


def _section(table: Table) -> Markup:
    note = element("p", {"class": "note"}, table.note) if table.note else ""
    return element("section", None, element("h2", None, table.title), drawn(table), note)


def drawn(table: Table) -> Markup:
    """A table; each cell carries its column's name, for narrow screens where a row becomes a block."""
    left = len(table.columns) - table.numbers
    heads = [element("th", {"scope": "col", "role": "columnheader"}, name) for name in table.columns]
    rows = []
    for index, row in enumerate(table.rows):
        cells = []
        for column, cell in enumerate(row):
            label = {"data-label": table.columns[column], "class": "number" if column >= left else None}
            if column == 0:
                cells.append(element("th", {"scope": "row", "role": "rowheader"}, cell))
            else:
                cells.append(element("td", {"role": "cell", **label}, cell))
        verdict = table.verdicts[index] if table.verdicts else None
        rows.append(element("tr", {"role": "row", "class": verdict}, *cells))
    head = element("thead", {"role": "rowgroup"}, element("tr", {"role": "row"}, *heads))
    return element("table", {"role": "table"}, head, element("tbody", {"role": "rowgroup"}, join(*rows)))
