"""A report's files in a folder: written whole or not at all, and the result file read back with suspicion.

Knows nothing about what the formats say.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from quantlab.checkpoint.header import open_regular
from quantlab.errors import OutputError, QuantlabError, ReportError
from quantlab.eval.reports.html import html
from quantlab.eval.reports.junit import environment_error, junit
from quantlab.eval.reports.markdown import markdown
from quantlab.eval.result import Report

RESULT, JUNIT, SUMMARY, PAGE = "report.json", "junit.xml", "summary.md", "report.html"
MAX_BYTES = 64_000_000
FIX = "the folder that `quantlab eval --out` wrote"


def write_reports(report: Report, out: Path) -> list[Path]:
    """Write report.json, junit.xml, summary.md and report.html into `out`, replacing older ones; raises OutputError.

    An older result file goes first and the new one comes last: where one stands, the others belong to it.
    """
    contents = {
        JUNIT: junit(report),
        SUMMARY: markdown(report).encode(),
        PAGE: html(report).encode(),
        RESULT: report.model_dump_json(indent=1).encode() + b"\n",
    }
    _remove(out, RESULT)
    return [write_file(out / name, content) for name, content in contents.items()]


def write_error(error: QuantlabError, out: Path) -> Path:
    """Write a junit.xml that says why there is no verdict, into `out`; raises OutputError.

    The other files of an older report are removed: a PASS beside an error would be believed.
    """
    _remove(out, RESULT, SUMMARY, PAGE)
    return write_file(out / JUNIT, environment_error(error))


def read_report(path: Path) -> Report:
    """The report in a result file, or in the folder that holds one; raises ReportError."""
    file = path / RESULT if path.is_dir() else path
    try:
        with open_regular(file) as reader:
            content = reader.read(MAX_BYTES + 1)
    except (OSError, QuantlabError) as error:
        reason = error.message if isinstance(error, QuantlabError) else f"cannot be read: {error}"
        raise ReportError(reason, where=str(file), fix=FIX) from error
    if len(content) > MAX_BYTES:
        raise ReportError(f"is larger than {MAX_BYTES:,} bytes", where=str(file), fix=FIX)
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        reason = f"is no result of an evaluation: {place + ': ' if place else ''}{told}"
        raise ReportError(reason, where=str(file), fix=FIX) from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise OutputError(reason, where=str(path), fix="choose another --out folder") from error


def _remove(out: Path, *names: str) -> None:
    for name in names:
        with _disk_errors(out / name):
            if out.is_dir():
                (out / name).unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> Path:
    """Write through a file beside it and a rename, so that a reader sees the old bytes or the new ones; returns `path`.

    Raises OutputError.
    """
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o644)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    return path
