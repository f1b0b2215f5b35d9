"""What the command hands to a run and what it does with what comes back; the run itself is a stand-in here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantlab.errors import CalibrationError
from quantlab.events import BlockDone, Listener, RunStarted
from quantlab.quant.options import QuantizeOptions, Result

Run = Callable[[QuantizeOptions, Listener], Result]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Put a function in the place of the run."""

    def put(run: Run) -> None:
        monkeypatch.setitem(sys.modules, "quantlab.quant.run", SimpleNamespace(quantize_checkpoint=run))

    return put


def finish(options: QuantizeOptions, listener: Listener) -> Result:
    """A run of one block."""
    listener(RunStarted(1, 0, 64, ()))
    listener(BlockDone(0, 1, 0.01, 2.0))
    return Result(options.out, 14, 4.125, 123_456, 2.5, {})


def test_result_goes_to_stdout_and_progress_to_stderr(cli: Any, model: Path, stand_in: Any) -> None:
    stand_in(finish)
    ran = cli("quantize", "model", "--out", "out")
    assert ran.code == 0
    assert "123,456 bytes" in ran.out and "4.125 in 14 modules" in ran.out
    assert "1/1" in ran.err and "1/1" not in ran.out


def test_json_is_one_object_on_stdout(cli: Any, model: Path, stand_in: Any) -> None:
    stand_in(finish)
    ran = cli("quantize", "model", "--out", "out", "--json")
    assert len(ran.out.splitlines()) == 1
    told = json.loads(ran.out)
    assert (told["out"], told["modules"], told["bytes"]) == ("out", 14, 123_456)
    assert (told["report"], told["timings"]) == ("out/quantlab_report.json", "out.timings.json")


def test_every_option_reaches_the_run(cli: Any, model: Path, stand_in: Any, here: Path) -> None:
    seen: list[QuantizeOptions] = []

    def run(options: QuantizeOptions, listener: Listener) -> Result:
        seen.append(options)
        return finish(options, listener)

    stand_in(run)
    (here / "text.txt").write_text("text")
    line = (
        "quantize model -o out --scheme w4a16 --quality fast --group-size 32 --asymmetric --calibration text.txt "
        "--split train --field body --samples 5 --seq-len 32 --seed 9 --device cpu --max-shard-size 2MB --restart"
    )
    assert cli(*line.split()).code == 0
    options = seen[0]
    assert (options.source, options.out, options.device) == (Path("model"), Path("out"), "cpu")
    assert (options.max_shard_size, options.force, options.restart) == (2_000_000, False, True)
    assert (options.recipe.name, options.recipe.group_size, options.recipe.symmetric) == ("w4a16-fast", 32, False)
    spec = options.calibration
    assert (spec.source, spec.split, spec.field) == ("text.txt", "train", "body")
    assert (spec.samples, spec.seq_len, spec.seed) == (5, 32, 9)


def test_interrupted_run_says_how_to_resume(cli: Any, model: Path, stand_in: Any) -> None:
    def run(options: QuantizeOptions, listener: Listener) -> Result:
        raise KeyboardInterrupt

    stand_in(run)
    ran = cli("quantize", "model", "--out", "out")
    assert ran.code == 130
    assert len(ran.lines) == 1
    assert "the same command again, which resumes" in ran.lines[0]


def test_failure_inside_the_run_keeps_its_code(cli: Any, model: Path, stand_in: Any) -> None:
    def run(options: QuantizeOptions, listener: Listener) -> Result:
        raise CalibrationError("100 tokens, and 65536 are needed", where="text.txt", fix="--samples 1")

    stand_in(run)
    ran = cli("quantize", "model", "--out", "out")
    assert ran.code == 6
    assert ran.lines == ["error: QL0601 text.txt: 100 tokens, and 65536 are needed; try: --samples 1"]
    assert ran.out == ""


def test_dry_run_never_reaches_the_run(cli: Any, model: Path, stand_in: Any) -> None:
    def run(options: QuantizeOptions, listener: Listener) -> Result:
        raise AssertionError("a dry run computes nothing")

    stand_in(run)
    assert cli("quantize", "model", "--dry-run").code == 0


def test_gpu_that_is_not_there_is_refused_but_can_be_planned_for(
    cli: Any, model: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.cli.preflight.has_gpu", lambda: False)
    stand_in(finish)
    ran = cli("quantize", "model", "--out", "out", "--device", "cuda")
    assert ran.code == 2
    assert "this machine has none" in ran.lines[0]
    assert cli("quantize", "model", "--dry-run", "--device", "cuda").code == 0
