"""Our balanced recipe against GPTQ done the common way, side by side on one machine.

Both get the same model, blocks and threads. Ours is timed from start to packed files in place, the yardstick only
from tokens to weights in memory. Knows nothing about what either does inside.
usage: python -m quantlab.bench.speed [MODEL] [--shared DIR] [--quality balanced] [--threads 2]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from quantlab.bench.measure import (
    SHIPPED_MODEL,
    append_rows,
    evaluation_files,
    held_out_ids,
    quantize,
)
from quantlab.bench.naive import Times, quantize_naively
from quantlab.checkpoint.load import load_model
from quantlab.errors import QuantlabError
from quantlab.eval.perplexity import Fidelity, compare_many
from quantlab.quant.data import load_blocks
from quantlab.quant.options import CalibrationSpec
from quantlab.text import load_tokenizer


def stages(result: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of our run, from the timings it leaves beside its output; empty if there are none."""
    path = result.get("timings")
    if not path:
        return {}
    return {name: float(seconds) for name, seconds in json.loads(Path(path).read_text())["stages"].items()}


def table(ours: dict[str, Any], naive: Times, fidelities: list[Fidelity]) -> Table:
    """Seconds and quality of both."""
    view = Table(title="speed", title_justify="left")
    view.add_column("run")
    for column in ("seconds", "share", "perplexity", "ratio to 16-bit"):
        view.add_column(column, justify="right")
    quantlab, yardstick = fidelities
    seconds = float(ours["seconds"])
    view.add_row(f"quantlab {ours['recipe']}", f"{seconds:.1f}", "", *_quality(quantlab))
    for name, spent in stages(ours).items():
        view.add_row(f"  {name}", f"{spent:.1f}", f"{100 * spent / seconds:.0f} %")
    view.add_section()
    view.add_row("calibrate twice, a Hessian per linear", f"{naive.total:.1f}", "", *_quality(yardstick))
    for name in ("collect", "solve", "propagate"):
        view.add_row(f"  {name}", f"{getattr(naive, name):.1f}", f"{100 * getattr(naive, name) / naive.total:.0f} %")
    view.add_section()
    view.add_row("ours / the common way", f"{seconds / naive.total:.3f}")
    return view


def _quality(fidelity: Fidelity) -> tuple[str, str]:
    return f"{fidelity.perplexity:.3f}", f"{fidelity.ratio:.4f}"


def arguments() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(description="balanced against GPTQ done the common way")
    parser.add_argument("model", type=Path, nargs="?", help="16-bit folder; the shipped model by default")
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/: takes books-28m and its texts")
    parser.add_argument("--quality", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32_768, help="evaluation tokens")
    parser.add_argument("--work", type=Path, default=Path("work/bench/speed"))
    parser.add_argument("--rows", type=Path, help="append the figures as a JSON line to this file")
    return parser.parse_args()


def inputs(asked: argparse.Namespace) -> tuple[Path, str | None, list[Path]]:
    """Model, calibration source, evaluation files; exits with one line that says what is missing."""
    if asked.shared is None:
        return asked.model or SHIPPED_MODEL, None, evaluation_files(None)
    model = asked.model or asked.shared / "models" / "books-28m"
    calibration = asked.shared / "data" / "calibration" / "books.txt"
    for path in (model, calibration):
        if not path.exists():
            sys.exit(f"{path} is not there; without --shared the bench takes the shipped model and texts")
    return model, str(calibration), evaluation_files([asked.shared / "data" / "books" / "eval"])


def main() -> None:
    """Time ours, time the yardstick, print both."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    model, calibration, files = inputs(asked)
    words = ["--quality", asked.quality, "--samples", str(asked.samples), "--device", "cpu"]
    out = asked.work / f"{model.name}-{asked.quality}"
    try:
        ours = quantize(model, out, words + (["--calibration", calibration] if calibration else []))
    except QuantlabError as error:
        sys.exit(error.one_line())
    blocks = load_blocks(CalibrationSpec(source=calibration, samples=asked.samples), load_tokenizer(model))
    yardstick = load_model(model, torch.float32, "cpu")
    naive = quantize_naively(yardstick, blocks.ids)
    candidates = [load_model(out, torch.float32, "cpu"), yardstick]
    baseline = load_model(model, torch.float32, "cpu")
    fidelities = compare_many(baseline, candidates, held_out_ids(model, files, asked.tokens))
    Console(width=None if sys.stdout.isatty() else 120).print(table(ours, naive, fidelities))
    row = {"bench": "speed", "model": model.name, "quality": asked.quality, "seconds": ours["seconds"]}
    row |= {"stages": stages(ours), "naive_seconds": naive.total, "ratio": ours["seconds"] / naive.total}
    append_rows(asked.rows, [row])


if __name__ == "__main__":
    main()
