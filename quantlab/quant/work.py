"""Where a run keeps what it has not put in place yet, and how to tell that it had only its tidying left to do.

Needs neither torch nor the source, so that the command line can ask before anything is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

JOURNAL, LOCK = "journal.jsonl", "lock"
REPORT_FILE = "quantlab_report.json"
PUBLISHED = "published"


def work_folder(out: Path) -> Path:
    """Where the run that makes `out` keeps its journal: beside it, so that the last step is a rename."""
    return out.with_name(f".{out.name}.quantlab")


def timings_file(out: Path) -> Path:
    """Where the seconds of the run that made `out` are: beside it, so that the same input gives the same folder."""
    return out.with_name(f"{out.name}.timings.json")


def contents(folder: Path) -> dict[str, Any]:
    """What tells a finished folder from another: its files' sizes and its report's digest; raises OSError."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {"files": files, "report": hashlib.sha256((folder / REPORT_FILE).read_bytes()).hexdigest()}


def published_by(out: Path) -> dict[str, Any] | None:
    """The report of the run that put `out` in place, if it was cut off before it could tidy up; else None.

    Such a run leaves its work folder with a journal whose last line tells what it had put in place, or with nothing.
    """
    folder = work_folder(out)
    try:
        left = {path.name for path in folder.iterdir()}
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        is_over = left <= {LOCK} or _is_last_line(folder / JOURNAL, contents(out))
    except (OSError, ValueError):
        return None
    return report if is_over and isinstance(report, dict) else None


def _is_last_line(journal: Path, found: dict[str, Any]) -> bool:
    lines = journal.read_text(encoding="utf-8").splitlines()
    return bool(lines) and json.loads(lines[-1]) == {"step": PUBLISHED, **found}
