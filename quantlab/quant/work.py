"""Where a run keeps what it has not put in place yet, and how to tell that it had only its tidying left to do.

Needs neither torch nor the source, so that the command line can ask before anything is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"
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
    """What the run that put `out` in place noted just before, if it was cut off before it could tidy up; else None."""
    try:
        lines = (work_folder(out) / JOURNAL).read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])
        is_ours = last["step"] == PUBLISHED and contents(out).items() <= last.items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return last if is_ours else None
