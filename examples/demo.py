"""Quantize the shipped model to INT4 and to INT8 through the command line, then show what it cost and what it kept.

usage: python examples/demo.py [--quality fast|balanced|best] [--tokens N] [--out DIR]
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from quantlab.checkpoint.inspection import inspect_folder
from quantlab.checkpoint.load import load_model
from quantlab.eval.perplexity import Fidelity, compare_many, read_ids
from quantlab.text import load_tokenizer

HERE = Path(__file__).resolve().parent
MODEL = HERE / "books-5m"
TEXT = HERE / "text" / "evaluation.txt"
SCHEMES = {"INT4": "w4a16", "INT8": "w8a8"}


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table; `seconds` is the quantizer's own time, None for the 16-bit source."""

    name: str
    folder: Path
    seconds: float | None


def quantize(scheme: str, quality: str, out: Path) -> float:
    """Run `quantlab quantize` on the shipped model; returns its seconds, or exits with its code."""
    words = ["quantize", str(MODEL), "--out", str(out), "--scheme", scheme, "--quality", quality, "--force", "--json"]
    print(f"$ quantlab {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "quantlab", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return float(json.loads(done.stdout)["seconds"])


def measure(rows: list[Row], tokens: int) -> list[Fidelity]:
    """Every row's model against the first one on held-out text."""
    models = [load_model(row.folder, torch.float32, "cpu") for row in rows]
    ids = read_ids([TEXT], load_tokenizer(MODEL), tokens)
    return compare_many(models[0], models, ids)


def table(rows: list[Row], fidelities: list[Fidelity]) -> Table:
    """The one table of the demo."""
    view = Table(title=f"books-5m on {fidelities[0].tokens:,} held-out tokens", title_justify="left")
    view.add_column("weights")
    for column in ("size on disk", "bits/weight", "perplexity", "ratio", "KL (nats)", "top-1 agreement", "seconds"):
        view.add_column(column, justify="right")
    for row, fidelity in zip(rows, fidelities, strict=True):
        found = inspect_folder(row.folder)
        bits = found.quantized_bits_per_weight or 16.0
        view.add_row(
            row.name,
            f"{found.file_bytes / 1e6:.2f} MB",
            f"{bits:.3f}",
            f"{fidelity.perplexity:.3f}",
            f"{fidelity.ratio:.4f}",
            f"{fidelity.kl:.5f}",
            f"{100 * fidelity.agreement:.1f} %",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
    return view


def main() -> None:
    """Quantize twice, measure, print."""
    parser = argparse.ArgumentParser(description="quantize the shipped model to INT4 and INT8, and compare")
    parser.add_argument("--quality", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens to measure on")
    parser.add_argument("--out", type=Path, default=Path("work/demo"))
    asked = parser.parse_args()
    started = time.monotonic()
    rows = [Row("16-bit", MODEL, None)]
    for name, scheme in SCHEMES.items():
        folder = asked.out / f"books-5m-{scheme}"
        rows.append(Row(name, folder, quantize(scheme, asked.quality, folder)))
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows, measure(rows, asked.tokens)))
    note = (
        "size on disk: all weight files; bits/weight: quantized modules with their scales, embeddings stay at 16 bits"
    )
    print(f"{note}\nwhole demo: {time.monotonic() - started:.0f} s; folders: {asked.out}/")


if __name__ == "__main__":
    main()
