"""Runs one small recipe, killed before each durable operation in turn, and continues it: prints what came out as JSON.

usage: python kill_points.py '{"model": .., "text": .., "folder": .., "passes": [..], "replaces": false}'
With `replaces`, an older output stands under the name and is to be replaced.
Each run is a forked child of this process, which never computes anything itself, so no thread pool is forked.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from quantlab.quant.options import CalibrationSpec, QuantizeOptions
from quantlab.quant.run import quantize_checkpoint
from quantlab.recipe import Recipe
from quantlab.text import load_tokenizer

DURABLE = ("fsync", "replace", "rename", "unlink", "truncate", "rmdir")


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child; returns its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kill_before(number: int | None, tally: Path) -> None:
    """Make durable operation `number` of this process its last moment; with None, only count them into `tally`."""
    done = itertools.count()

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def operation(*arguments: object, **options: object) -> object:
            now = next(done)
            if now == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if number is None:
                tally.write_text(str(now + 1))
            return real(*arguments, **options)

        return operation

    for name in DURABLE:
        setattr(os, name, wrap(getattr(os, name)))


def main() -> None:
    asked = json.loads(sys.argv[1])
    model, text, folder, replaces = Path(asked["model"]), asked["text"], Path(asked["folder"]), asked["replaces"]
    recipe = Recipe(group_size=32, passes=asked["passes"])
    torch.set_num_threads(1)
    load_tokenizer(model)  # imports that every child would repeat

    def run(out: Path) -> None:
        spec = CalibrationSpec(text, samples=8, seq_len=32)
        options = QuantizeOptions(model, out, recipe, spec, device="cpu", force=replaces)
        quantize_checkpoint(options, lambda event: None)

    def make_place(place: Path) -> Path:
        place.mkdir()
        if replaces:
            shutil.copytree(model, place / "out")
        return place

    def counted() -> None:
        kill_before(None, folder / "tally")
        run(make_place(folder / "whole") / "out")

    assert forked(counted) == 0
    operations, wanted = int((folder / "tally").read_text()), digests(folder / "whole" / "out")
    told = {"operations": operations, "files": sorted(wanted), "points": []}
    for number in range(operations):
        place = make_place(folder / "killed")

        def killed(number: int = number, place: Path = place) -> None:
            kill_before(number, folder / "tally")
            run(place / "out")

        status = forked(killed)
        early = digests(place / "out") if (place / "out").exists() else None
        resumed = forked(lambda place=place: run(place / "out"))
        point = {
            "number": number,
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "published": early == wanted,
            "whole": early in (None, wanted, digests(model) if replaces else None),
            "resumed": resumed == 0,
            "identical": digests(place / "out") == wanted,
            "left": sorted(path.name for path in place.iterdir()),
        }
        told["points"].append(point)
        shutil.rmtree(place)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
