"""Perplexity, KL and time of every method on every model: the table behind each claim about quality.

Each method is a built-in recipe run through the command line; the gap closed is measured against plain rounding to
nearest (absmax / 7.5) on the same tokens. Knows nothing about how a method works.
usage: python -m quantlab.bench.quality [MODEL ...] [--shared DIR] [--methods rtn,gptq,...] [--calibration PATH]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantlab.bench.measure import (
    SHIPPED_MODEL,
    Run,
    append_rows,
    evaluation_files,
    gap_closed,
    held_out_ids,
    quantize,
)
from quantlab.checkpoint.load import load_model
from quantlab.errors import QuantlabError, UsageError
from quantlab.eval.perplexity import Fidelity, compare
from quantlab.models.device import find_device

METHODS = {
    "w4a16": ("rtn", "gptq", "awq", "awq-gptq", "fast", "balanced", "best"),
    "w8a8": ("rtn", "gptq", "smoothquant", "fast", "balanced", "best"),
}
AUTOROUND = "auto-round"


@dataclass(frozen=True, slots=True)
class Job:
    """One model with the texts to measure it on: name of the text -> files."""

    model: Path
    texts: dict[str, list[Path]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What every run of one bench shares."""

    scheme: str
    calibration: str | None
    samples: int
    tokens: int
    work: Path
    device: str
    autoround: Path | None


def shared_jobs(root: Path) -> list[Job]:
    """The three models and the texts of a folder laid out as models/ and data/. Raises UsageError if one is missing."""
    books = root / "data" / "books" / "eval"
    wiki = root / "data" / "wikitext-2" / "wiki.test.raw"
    names = ("books-5m", "books-28m", "prose-82m")
    missing = [path for path in (books, wiki, *(root / "models" / name for name in names)) if not path.exists()]
    if missing:
        raise UsageError("not there; give models by name instead: quality MODEL ...", where=str(missing[0]))
    texts = {"books": evaluation_files([books])}
    both = texts | {"wikitext-2": [wiki]}
    return [Job(root / "models" / name, both if name == "prose-82m" else texts) for name in names]


def words(settings: Settings, method: str) -> list[str]:
    """The options of one run; `best` takes all the text that there is, the others the same few blocks."""
    samples = "all" if method == "best" else str(settings.samples)
    options = ["--recipe", f"{settings.scheme}-{method}", "--samples", samples, "--device", settings.device]
    return options + (["--calibration", settings.calibration] if settings.calibration else [])


def make(job: Job, method: str, settings: Settings) -> tuple[Path, float]:
    """Quantize the job's model by one method; returns the folder and the seconds it took."""
    out = settings.work / f"{job.model.name}-{settings.scheme}-{method}"
    if method == AUTOROUND:
        assert settings.autoround is not None
        return out, peer(job.model, out, settings)
    return out, float(quantize(job.model, out, words(settings, method))["seconds"])


def peer(model: Path, out: Path, settings: Settings) -> float:
    """AutoRound in the environment of its own interpreter, on the same blocks; returns its seconds."""
    assert settings.autoround is not None
    line = [str(settings.autoround), "-m", "quantlab.bench.autoround", str(model), "--out", str(out)]
    line += ["--samples", str(settings.samples), "--tokens", "1024"]
    line += ["--calibration", settings.calibration] if settings.calibration else []
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise QuantlabError(f"exit code {done.returncode}: {done.stderr.strip()[-300:]}", where=AUTOROUND)
    return float(json.loads(done.stdout.strip().split("\n")[-1])["seconds"])


def measure(job: Job, methods: Sequence[str], settings: Settings) -> Iterator[Run]:
    """Every method on one model, on each of its texts, as soon as it is known; measured in fp32 on the same device."""
    device = find_device(settings.device)
    baseline = load_model(job.model, torch.float32, device)
    for method in methods:
        folder, seconds = make(job, method, settings)
        candidate = load_model(folder, torch.float32, device)
        for text, files in job.texts.items():
            ids = held_out_ids(job.model, files, settings.tokens)
            yield Run(method, job.model.name, text, seconds, compare(baseline, candidate, ids))


def table(runs: Sequence[Run]) -> Table:
    """All runs, one row each, best seen beside the plain rounding of the same model and text."""
    view = Table(title="quality", title_justify="left")
    for column in ("model", "text", "method"):
        view.add_column(column)
    for column in ("perplexity", "ratio", "gap closed", "KL (nats)", "top-1", "seconds"):
        view.add_column(column, justify="right")
    seen: set[tuple[str, str]] = set()
    for run in sorted(runs, key=lambda r: (r.model, r.text)):
        if (run.model, run.text) not in seen:
            seen.add((run.model, run.text))
            view.add_section()
            view.add_row(run.model, run.text, "16-bit", f"{run.fidelity.baseline_perplexity:.3f}")
        view.add_row("", "", run.method, *_figures(run, _plain(runs, run)))
    return view


def _plain(runs: Sequence[Run], run: Run) -> Fidelity | None:
    same = (r.fidelity for r in runs if (r.method, r.model, r.text) == ("rtn", run.model, run.text))
    return next(same, None)


def _figures(run: Run, plain: Fidelity | None) -> list[str]:
    found = run.fidelity
    closed = "" if plain is None else f"{100 * _gap(found, plain):.1f} %"
    seconds = "" if run.seconds is None else f"{run.seconds:.1f}"
    agreement = f"{100 * found.agreement:.1f} %"
    return [f"{found.perplexity:.3f}", f"{found.ratio:.4f}", closed, f"{found.kl:.5f}", agreement, seconds]


def _gap(found: Fidelity, plain: Fidelity) -> float:
    return gap_closed(found.perplexity, plain.perplexity, plain.baseline_perplexity)


def arguments() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(description="perplexity, KL and time of every method on every model")
    parser.add_argument("models", type=Path, nargs="*", help="16-bit folders; the shipped model by default")
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/, in place of MODEL and --evaluation")
    parser.add_argument("--only", help="with --shared: model names, separated by commas")
    parser.add_argument("--scheme", default="w4a16", choices=sorted(METHODS))
    parser.add_argument("--methods", help="separated by commas; all of the scheme's by default")
    parser.add_argument("--calibration", help="text, folder or dataset id; the bundled text by default")
    parser.add_argument("--evaluation", type=Path, nargs="+", help="text files or folders; the shipped text by default")
    parser.add_argument("--samples", type=int, default=64, help="calibration blocks of 1,024 tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="evaluation tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autoround", type=Path, help="an interpreter with the bench extra: AutoRound joins the table")
    parser.add_argument("--work", type=Path, default=Path("work/bench/quality"))
    parser.add_argument("--rows", type=Path, help="append one JSON line a run to this file")
    return parser.parse_args()


def jobs(asked: argparse.Namespace) -> list[Job]:
    """The models and texts to measure."""
    if asked.shared is None:
        texts = {"held-out": evaluation_files(asked.evaluation)}
        return [Job(model, texts) for model in asked.models or [SHIPPED_MODEL]]
    wanted = asked.only.split(",") if asked.only else None
    return [job for job in shared_jobs(asked.shared) if wanted is None or job.model.name in wanted]


def main() -> None:
    """Measure everything asked for; print one line a run as it comes and the table at the end."""
    asked = arguments()
    calibration = asked.calibration
    if calibration is None and asked.shared is not None:
        calibration = str(asked.shared / "data" / "calibration" / "books.txt")
    settings = Settings(
        asked.scheme, calibration, asked.samples, asked.tokens, asked.work, asked.device, asked.autoround
    )
    methods = asked.methods.split(",") if asked.methods else [*METHODS[asked.scheme]]
    methods += [AUTOROUND] if asked.autoround else []
    runs: list[Run] = []
    try:
        for job in jobs(asked):
            for run in measure(job, methods, settings):
                runs.append(run)
                append_rows(asked.rows, [run.as_json()])
                print(f"{run.model} {run.text} {run.method}: {run.fidelity.perplexity:.3f}", file=sys.stderr)
    except QuantlabError as error:
        sys.exit(error.one_line())
    Console(width=None if sys.stdout.isatty() else 120).print(table(runs))


if __name__ == "__main__":
    main()
