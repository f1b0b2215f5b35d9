"""The parts of the benches that could lie: what is compared, what is counted, what is called missing."""

import json
import sys
from pathlib import Path

import pytest

from quantlab.bench import memory, quality, resume
from quantlab.bench.measure import Run, append_rows, command, evaluation_files, gap_closed, held_out_ids
from quantlab.checkpoint.load import load_model
from quantlab.errors import UsageError
from quantlab.eval.perplexity import Fidelity
from quantlab.models.config import ModelConfig


def fidelity(perplexity: float) -> Fidelity:
    return Fidelity(1000, 20.0, perplexity, 0.01, 0.9)


def test_gap_closed_runs_from_rtn_to_lossless() -> None:
    assert gap_closed(candidate=22.0, rtn=22.0, baseline=20.0) == 0.0
    assert gap_closed(candidate=20.0, rtn=22.0, baseline=20.0) == 1.0
    assert gap_closed(candidate=23.0, rtn=22.0, baseline=20.0) == -0.5


def test_evaluation_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in evaluation_files([tmp_path])] == ["a.txt", "b.txt"]
    with pytest.raises(UsageError, match="no such evaluation text"):
        evaluation_files([tmp_path / "missing"])


def test_the_shipped_text_is_the_default(books_5m: Path, evaluation_text: Path) -> None:
    assert evaluation_files(None) == [evaluation_text]
    assert len(held_out_ids(books_5m, evaluation_files(None), 65_536)) == 65_536


def test_rows_are_json_lines_with_the_environment(tmp_path: Path) -> None:
    run = Run("gptq", "m", "books", 3.5, fidelity(21.0))
    append_rows(tmp_path / "new" / "rows.jsonl", [run.as_json(), run.as_json()])
    rows = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["perplexity"] == 21.0
    assert rows[0]["ratio"] == pytest.approx(1.05)
    assert rows[0]["environment"]["torch"]
    append_rows(None, [run.as_json()])


def test_shared_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        quality.shared_jobs(tmp_path)
    assert "data/books/eval" in caught.value.one_line()


def test_the_table_measures_the_gap_on_the_same_model_and_text() -> None:
    runs = [
        Run("rtn", "small", "books", 1.0, fidelity(24.0)),
        Run("rtn", "large", "books", 1.0, fidelity(22.0)),
        Run("gptq", "small", "books", 5.0, fidelity(21.0)),
        Run("gptq", "large", "books", 5.0, fidelity(21.0)),
    ]
    cells = list(quality.table(runs).columns[5].cells)
    assert [cell for cell in cells if cell] == ["0.0 %", "50.0 %", "0.0 %", "75.0 %"]


def test_best_takes_all_the_text_and_the_others_the_same_blocks(tmp_path: Path) -> None:
    settings = quality.Settings("w4a16", "books.txt", 64, 65_536, tmp_path, "cpu", None)
    options = {method: quality.words(settings, method) for method in ("gptq", "best")}
    assert options["gptq"][options["gptq"].index("--samples") + 1] == "64"
    assert options["best"][options["best"].index("--samples") + 1] == "all"
    assert all(words[:2] == ["--recipe", f"w4a16-{method}"] for method, words in options.items())


def test_the_random_checkpoint_is_as_large_as_asked_and_loads(tmp_path: Path) -> None:
    large = memory.random_config(2048, 3.2)
    config = ModelConfig.from_json(large, "config.json")
    assert config.num_layers >= 24
    assert config.num_layers * memory.block_bytes(config) >= 3.2e9
    small = memory.random_config(512, 0.001) | {"num_hidden_layers": 2}
    memory.write_checkpoint(tmp_path / "random", small)
    assert load_model(tmp_path / "random", memory.torch.float32, "cpu").config.num_layers == 2


def test_peak_memory_is_that_of_the_process(tmp_path: Path) -> None:
    script = "x = bytearray(200_000_000); import time; time.sleep(0.3)"
    assert memory.peak_of([sys.executable, "-c", script], tmp_path / "log") > 200_000_000
    assert memory.peak_of([sys.executable, "-c", "import time; time.sleep(0.3)"], tmp_path / "log") < 100_000_000


def test_a_high_water_mark_is_read_in_bytes() -> None:
    assert memory._parse_high_water("Name:\tx\nVmHWM:\t   20 kB\nVmRSS:\t 10 kB\n") == 20 * 1024
    assert memory._parse_high_water("Name:\tx\n") == 0


def test_differences_are_missing_new_and_changed_files() -> None:
    assert resume.differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == ("b", "c", "d")


def test_digests_see_every_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"")
    assert list(resume.digests(tmp_path)) == ["sub/x"]


def test_a_run_is_killed_without_a_chance_to_tidy_up(tmp_path: Path) -> None:
    script = f"""
import atexit, pathlib, time
atexit.register(lambda: pathlib.Path({str(tmp_path / "tidied")!r}).touch())
time.sleep(60)
"""
    assert resume.kill_after([sys.executable, "-c", script], 0.5, tmp_path / "log")
    assert not (tmp_path / "tidied").exists()
    assert not resume.kill_after([sys.executable, "-c", "pass"], 30.0, tmp_path / "log")


def test_a_run_is_the_command_that_a_user_would_type(tmp_path: Path) -> None:
    line = command(tmp_path / "m", tmp_path / "o", ["--quality", "fast"])
    assert line[:4] == [sys.executable, "-m", "quantlab", "quantize"]
    assert line[-2:] == ["--quality", "fast"]
