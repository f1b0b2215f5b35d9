"""What the benches share: running the command line, which texts and tokens to measure on, where results go.

Every run is a `quantlab quantize` of its own, as a user would start it. Knows nothing about any one method.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantlab
from quantlab.errors import QuantlabError, UsageError
from quantlab.eval.perplexity import Fidelity, read_ids
from quantlab.text import load_tokenizer

REPOSITORY = Path(quantlab.__file__).parent.parent
SHIPPED_MODEL = REPOSITORY / "examples" / "books-5m"
SHIPPED_TEXT = REPOSITORY / "examples" / "text" / "evaluation.txt"


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run; `seconds` is the quantizer's wall time, None for a baseline."""

    method: str
    model: str
    text: str
    seconds: float | None
    fidelity: Fidelity

    def as_json(self) -> dict[str, Any]:
        """The run as plain values."""
        row = asdict(self)
        return row | row.pop("fidelity") | {"ratio": self.fidelity.ratio}


def quantize(model: Path, out: Path, words: Sequence[str], log: Path | None = None) -> dict[str, Any]:
    """Run `quantlab quantize model --out out` from the beginning with further `words`; returns what --json prints.

    Progress goes to `log`, by default beside `out`. Raises QuantlabError with the command's own last line if it fails.
    """
    log = log or out.with_name(out.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            command(model, out, ["--restart", *words]), stdout=subprocess.PIPE, stderr=file, text=True
        )
    if done.returncode:
        lines = log.read_text().strip().split("\n")
        raise QuantlabError(f"exit code {done.returncode}: {lines[-1]}", where=str(log))
    return json.loads(done.stdout)


def command(model: Path, out: Path, words: Sequence[str]) -> list[str]:
    """The command line of one quantization."""
    return [sys.executable, "-m", "quantlab", "quantize", str(model), "--out", str(out), "--force", "--json", *words]


def evaluation_files(paths: Sequence[Path] | None) -> list[Path]:
    """The text files that `paths` name, folders expanded and sorted by name; the shipped text for None.

    Raises UsageError for a path that does not exist.
    """
    files: list[Path] = []
    for path in paths or [SHIPPED_TEXT]:
        if not path.exists():
            raise UsageError("no such evaluation text", where=str(path))
        files += sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return files


def held_out_ids(model: Path, files: Sequence[Path], tokens: int) -> Tensor:
    """The first `tokens` ids of the files end to end, by the model's own tokenizer: [T] int64."""
    return read_ids(files, load_tokenizer(model), tokens)


def gap_closed(candidate: float, rtn: float, baseline: float) -> float:
    """The share of the perplexity gap between plain RTN and 16-bit that a method closes; 1.0 is all of it."""
    return (rtn - candidate) / (rtn - baseline)


def environment() -> dict[str, Any]:
    """What a figure must be read with: versions, cores, device, date."""
    return {
        "quantlab": quantlab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "date": date.today().isoformat(),
    }


def append_rows(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines to `path`, each with the environment; None writes nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row | {"environment": environment()}) + "\n" for row in rows)
