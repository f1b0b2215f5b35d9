"""The frames of a page: a table, and a plot with its finding in words, its legend and its numbers.

Knows nothing about what is shown in them.
"""

from collections.abc import Sequence

from quantlab.eval.reports.elements import Markup, element, join
from quantlab.eval.reports.svg import box, line
from quantlab.eval.reports.tables import Table


def panel(title: str, finding: str, legend: Markup, plot: Markup, numbers: Table | None = None) -> Markup:
    """A plot: what it shows, what comes out of it, and the same as a table for those who want or need one."""
    caption = element("figcaption", None, element("h3", None, title), element("p", None, finding))
    data = "" if numbers is None else folded("The numbers", drawn(numbers))
    return element("figure", None, caption, legend, plot, data)


def legend(*entries: tuple[str, str]) -> Markup:
    """What each class of line, or of bar, stands for."""
    items = [element("li", None, _swatch(kind), name) for kind, name in entries]
    return element("ul", {"class": "legend"}, *items)


def folded(title: str, *children: str) -> Markup:
    """What is shown when asked for; a browser's own element, which needs no script."""
    return element("details", None, element("summary", None, title), *children)


def drawn(table: Table) -> Markup:
    """A table; each cell carries its column's name, for narrow screens where a row becomes a block.

    The roles say what the elements say already, which browsers forget where the style makes blocks of them.
    """
    left = len(table.columns) - table.numbers
    heads = []
    for column, name in enumerate(table.columns):
        kind = "number" if column >= left else None
        heads.append(element("th", {"scope": "col", "role": "columnheader", "class": kind}, name))
    head = element("thead", {"role": "rowgroup"}, element("tr", {"role": "row"}, *heads))
    rows = join(*(_row(table, index) for index in range(len(table.rows))))
    body = element("tbody", {"role": "rowgroup"}, rows)
    note = element("p", {"class": "note"}, table.note) if table.note else ""
    kind = "pairs" if len(table.columns) == 2 and not table.numbers else None
    return join(element("table", {"class": kind, "role": "table", "aria-label": table.title}, head, body), note)


def _row(table: Table, index: int) -> Markup:
    left = len(table.columns) - table.numbers
    cells = []
    for column, cell in enumerate(table.rows[index]):
        kind = ("number" if column >= left else "") + ("" if cell else " empty")
        shared = {"class": kind.strip() or None, "data-label": table.columns[column]}
        if column == 0:
            cells.append(element("th", {"scope": "row", "role": "rowheader"}, cell))
        else:
            cells.append(element("td", {"role": "cell", **shared}, cell))
    return element("tr", {"role": "row", "class": table.verdicts[index] if table.verdicts else None}, *cells)


def _swatch(kind: str) -> Markup:
    shape = box((2, 1), 20, 8, kind) if kind.startswith("bar") else line((0, 5), (24, 5), kind)
    return element("svg", {"viewBox": "0 0 24 10", "class": "swatch", "aria-hidden": "true"}, shape)


def spread(values: Sequence[Markup]) -> Markup:
    """Plots side by side where there is room."""
    return element("div", {"class": "plots"}, *values)
