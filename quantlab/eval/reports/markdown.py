"""A report as GitHub-flavoured Markdown, for a CI step summary or a comment.

Text from outside is escaped so that it shows as it is: no table broken by a pipe, no link, no mention, no HTML.
Knows nothing about files.
"""

import re

from quantlab.eval.reports.tables import Table, cost_table, gate_table, provenance, task_table
from quantlab.eval.reports.words import one_line, verdict_sentence, verdict_word
from quantlab.eval.result import Report

MAX_ROWS = 100  # GitHub drops a step summary over 1 MiB
MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
SPECIAL = re.compile(r"[\\`*_\[\]<>|~$&]|:(?=/)|(?<=\bwww)\.", re.IGNORECASE)
# No escape stops a mention, the number of an issue or an emoji's name: they are made of the rendered text.
REFERENCE = re.compile(r"@(?=\w)|#(?=\d)|:(?=[a-z+-][\w+-]*:)", re.IGNORECASE)
WORD_JOINER = "\u2060"


def markdown(report: Report) -> str:
    """The whole summary."""
    mark = MARKS[report.gate.verdict] if report.gate else "ℹ️"
    names = f"{escaped(one_line(report.candidate.path))} against {escaped(one_line(report.baseline.path))}"
    parts = [
        f"## {mark} {verdict_word(report)}: {escaped(verdict_sentence(report))}",
        f"Candidate {names} ({escaped(one_line(report.candidate.scheme))})",
    ]
    for table in (gate_table(report), cost_table(report), task_table(report)):
        if table is not None:
            parts += [f"### {table.title}", _drawn(table.first(MAX_ROWS)), _note(table.first(MAX_ROWS))]
    sources = provenance(report).first(MAX_ROWS)
    parts += ["<details><summary>Provenance</summary>", _drawn(sources), _note(sources), "</details>"]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """`text`, one line, as Markdown that shows exactly it."""
    return REFERENCE.sub(rf"\g<0>{WORD_JOINER}", SPECIAL.sub(r"\\\g<0>", text))


def _drawn(table: Table) -> str:
    left = len(table.columns) - table.numbers
    rule = "|" + "|".join("---" if index < left else "---:" for index in range(len(table.columns))) + "|"
    rows = [_row(table.columns), rule]
    for index, row in enumerate(table.rows):
        mark = f"{MARKS[table.verdicts[index]]} " if table.verdicts else ""
        rows.append(_row(row, mark))
    return "\n".join(rows)


def _row(cells: tuple[str, ...], mark: str = "") -> str:
    first, *rest = (escaped(cell) for cell in cells)
    return "| " + " | ".join([mark + first, *rest]) + " |"


def _note(table: Table) -> str:
    return f"<sub>{escaped(table.note)}</sub>" if table.note else ""
