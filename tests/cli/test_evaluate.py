"""`quantlab eval` as people and CI run it: verdicts as exit codes, reports, and every kind of bad input in one line."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.eval.result import Report

SMALL = ("--tokens", "512", "--window", "64", "--dtype", "float32", "--device", "cpu")
GATE = "require:\n  - metric: {metric}\n    max: {limit}\n"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def evaluate(cli: Any, here: Path, books_5m: Path) -> Callable[..., Any]:
    """Run `quantlab eval CANDIDATE --baseline books-5m` on a little text, with further options."""

    def run(candidate: Path, *options: object) -> Any:
        cache = () if "--no-cache" in options or "--cache" in options else ("--cache", here / "cache")
        return cli("eval", candidate, "--baseline", books_5m, *SMALL, *cache, *options)

    return run


@pytest.fixture
def copied(here: Path, books_5m: Path) -> Path:
    """A copy of the shipped model that a test may damage."""
    return Path(shutil.copytree(books_5m, here / "candidate"))


def test_the_verdict_is_the_exit_code(evaluate: Any, int4_model: Path, here: Path) -> None:
    codes = {}
    # A limit at the estimate itself can be neither shown to hold nor shown to be missed.
    measured = json.loads(evaluate(int4_model, "--json").out)["texts"][0]["kl"]["mean"]["value"]
    for verdict, limit in (("pass", 10.0), ("fail", 1e-6), ("inconclusive", measured)):
        (here / "gate.yaml").write_text(GATE.format(metric="kl.mean", limit=f"{limit:.12f}"))
        ran = evaluate(int4_model, "--gate", "gate.yaml")
        assert verdict.upper() in ran.out
        codes[verdict] = ran.code
    assert codes == {"pass": 0, "fail": 10, "inconclusive": 11}


def test_json_is_the_result_file_and_nothing_else(evaluate: Any, int4_model: Path) -> None:
    ran = evaluate(int4_model, "--json", "--out", "reports")
    report = Report.model_validate_json(ran.out)
    written = Report.model_validate_json(Path("reports/report.json").read_text())
    assert report == written
    assert report.gate is not None and report.gate.source == "default"
    assert ran.code == {"pass": 0, "fail": 10, "inconclusive": 11}[report.gate.verdict]


def test_every_report_is_written(evaluate: Any, int4_model: Path) -> None:
    ran = evaluate(int4_model, "--out", "deep/reports")
    assert {path.name for path in Path("deep/reports").iterdir()} == {
        "report.json", "report.html", "junit.xml", "summary.md",
    }  # fmt: skip
    assert "written  deep/reports/report.html" in ran.out
    assert evaluate(int4_model, "--out", "deep/reports").code == ran.code


def test_texts_and_tasks_together(evaluate: Any, int8_model: Path, here: Path, evaluation_text: Path) -> None:
    text = evaluation_text.read_text()
    (here / "novel.txt").write_text(text[:20_000])
    (here / "data").mkdir()
    words = re.findall(r"[^.]{40,120}\.", text.replace("\n", " "))[:6]
    items = [{"context": line.rsplit(" ", 1)[0], "continuation": line.rsplit(" ", 1)[1]} for line in words]
    (here / "data" / "lambada_openai.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ("--text", "novel.txt", "--protocol", "both", "--tasks", "lambada_openai", "--task-dir", "data")
    ran = evaluate(int8_model, *options, "--limit", "5", "--json")
    report = Report.model_validate_json(ran.out)
    assert [text.name for text in report.texts] == ["novel", "novel-rolling"]
    assert [(task.name, task.items) for task in report.tasks] == [("lambada_openai", 5)]
    assert report.noise is not None and [noise.name for noise in report.noise.tasks] == ["lambada_openai"]


def test_bundled_text_is_said_to_be_used(evaluate: Any, books_5m: Path) -> None:
    ran = evaluate(books_5m)
    assert ran.code == 0
    assert "no --text given" in ran.lines[0]
    assert any(line.startswith("candidate bundled 8/8") for line in ran.lines)


def test_the_second_run_finds_the_baseline_in_the_cache(evaluate: Any, int4_model: Path, int8_model: Path) -> None:
    first = Report.model_validate_json(evaluate(int4_model, "--json").out)
    second = Report.model_validate_json(evaluate(int8_model, "--json").out)
    assert (first.baseline_from_cache, second.baseline_from_cache) == (False, True)
    assert first.texts[0].baseline_perplexity == second.texts[0].baseline_perplexity
    assert not Report.model_validate_json(evaluate(int8_model, "--json", "--no-cache").out).baseline_from_cache


def assert_refused(ran: Any, code: int, fragment: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert ran.code == code, ran.err
    assert len(ran.lines) == 1, ran.err
    assert ran.lines[0].startswith("error: QL") and fragment in ran.lines[0]
    assert ran.out == ""


ARGUMENTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "missing text": (("--text", "no.txt"), 6, "no.txt: no such file or folder"),
    "empty text": (("--text", "empty.txt"), 6, "empty.txt: the text is empty"),
    "blank text": (("--text", "blank.txt"), 6, "blank.txt: the text is empty"),
    "short text": (("--text", "short.txt"), 6, "tokens of text do not fill one window of 64"),
    "text that is not text": (("--text", "latin.txt"), 6, "not UTF-8"),
    "folder without text": (("--text", "folder"), 6, "holds no .txt"),
    "same text twice": (("--text", "short.txt", "--text", "short.txt"), 2, "two texts are called 'short'"),
    "results of one name": (
        ("--text", "a.txt", "--text", "a-rolling.txt", "--protocol", "both"),
        2,
        "--text: two results would be called 'a-rolling'; try: rename a file",
    ),
    "unknown task": (("--tasks", "lambada_openia", "--task-dir", "folder"), 2, "did you mean 'lambada_openai'?"),
    "task without data": (("--tasks", "piqa", "--task-dir", "folder"), 2, "piqa"),
    "unknown suite": (
        ("--suite", "quik", "--task-dir", "folder"), 2, "--suite or --tasks: unknown task 'quik', did you mean 'quick'?"
    ),  # fmt: skip
    "data of no task": (("--task-dir", "folder"), 2, "--task-dir: no task is named"),
    "tasks without a name": (("--tasks", " ,"), 2, "--tasks: names nothing"),
    "suite without a name": (("--suite", ""), 2, "--suite: names nothing"),
    "limit of no task": (("--limit", "5"), 2, "--limit: no task is named"),
    "missing gate": (("--gate", "no.yaml"), 2, "no.yaml"),
    "malformed gate": (("--gate", "broken.yaml"), 2, "yaml:1:1: unknown key 'requires', did you mean 'require'?"),
    "gate on what is not measured": (("--gate", "tasks.yaml"), 2, "tasks.yaml:2:5: 'task.piqa' is not measured"),
    "window beyond the model": (("--window", "4096"), 2, "4096 tokens are more than the models' 2048"),
    "window of nothing": (("--window", "1"), 2, "--window"),
    "unknown protocol": (("--protocol", "gtpq"), 2, "did you mean 'gptq'?"),
    "unknown dtype": (("--dtype", "int4"), 2, "--dtype"),
    "no such device": (("--device", "cuda:77"), 2, "cuda:77"),
    "cache and no cache": (("--cache", "c", "--no-cache"), 2, "exclude each other"),
    "cache in a file": (("--cache", "short.txt"), 7, "short.txt"),
    "reports in a file": (("--out", "short.txt/reports"), 7, "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_bad_argument_is_refused(kind: str, evaluate: Any, books_5m: Path, here: Path) -> None:
    options, code, fragment = ARGUMENTS[kind]
    (here / "folder").mkdir()
    (here / "empty.txt").write_bytes(b"")
    (here / "blank.txt").write_text(" \n\n")
    (here / "short.txt").write_text("a few words")
    for name in ("a.txt", "a-rolling.txt"):
        (here / name).write_text("words " * 1000)
    (here / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (here / "broken.yaml").write_text("requires: []\n")
    (here / "tasks.yaml").write_text(GATE.format(metric="task.piqa", limit=1).replace("max: 1", "test: mcnemar"))
    assert_refused(evaluate(books_5m, *options), code, fragment)


def test_a_baseline_is_needed(cli: Any, books_5m: Path) -> None:
    assert_refused(cli("eval", books_5m), 2, "--baseline")


@pytest.mark.parametrize("role", ["candidate", "baseline"])
def test_a_missing_folder_is_refused_whoever_it_is(role: str, cli: Any, here: Path, books_5m: Path) -> None:
    folders = {"candidate": books_5m, "baseline": books_5m, role: Path("nowhere")}
    ran = cli("eval", folders["candidate"], "--baseline", folders["baseline"], *SMALL, "--no-cache")
    assert_refused(ran, 4, "nowhere")


def test_another_tokenizer_is_refused(evaluate: Any, copied: Path) -> None:
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = sorted(vocab)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_refused(evaluate(copied), 2, "candidate: the tokenizer is not the baseline's")


def test_another_vocabulary_is_refused(evaluate: Any, models: Any, books_5m: Path) -> None:
    folder = models.sound()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(books_5m / name, folder / name)
    assert_refused(evaluate(folder), 2, "has 64 logits a token and the baseline 8192")


def test_a_missing_tokenizer_is_refused(evaluate: Any, copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert_refused(evaluate(copied), 4, "candidate")


def overwrite(folder: Path, name: str, values: bytes) -> None:
    """Put bytes at the beginning of a tensor."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = json.loads(bytes(data[8 : 8 + length]))[name]["data_offsets"]
    whole = values * ((end - begin) // len(values))
    data[8 + length + begin : 8 + length + end] = whole
    path.write_bytes(data)


def test_weights_that_are_not_numbers_are_refused(evaluate: Any, copied: Path) -> None:
    overwrite(copied, Q_PROJ, b"\xc0\x7f")
    ran = evaluate(copied)
    assert ran.code == 4 and ran.out == ""
    assert f"tensor {Q_PROJ}: holds NaN or Inf" in ran.lines[-1]


def test_logits_that_are_not_numbers_are_refused(evaluate: Any, copied: Path) -> None:
    """Finite weights of 3e38 whose products are not: what a broken scale does to a model."""
    overwrite(copied, "model.layers.0.mlp.down_proj.weight", struct.pack("<f", 3e38)[2:])
    ran = evaluate(copied, "--out", "reports")
    assert ran.code == 12 and ran.out == ""
    assert "the candidate's logits are NaN or infinite" in ran.lines[-1]
    assert [line for line in ran.lines if "error" in line] == ran.lines[-1:]
    junit = Path("reports/junit.xml").read_text()
    assert "<error" in junit and "<failure" not in junit
    assert [path.name for path in Path("reports").iterdir()] == ["junit.xml"]


@pytest.mark.parametrize("raised", [None, RuntimeError("kernel"), MemoryError(), KeyboardInterrupt()])
def test_whatever_went_wrong_takes_the_place_of_an_older_verdict(
    raised: BaseException | None, evaluate: Any, books_5m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall(*_: object) -> None:
        assert raised is not None
        raise raised

    Path("reports").mkdir()
    for name in ("report.json", "report.html", "summary.md"):
        Path("reports", name).write_text("PASS")
    monkeypatch.setattr("quantlab.eval.run.run_candidate", fall)
    wrong = ("--gate", "absent.yaml") if raised is None else ()
    ran = evaluate(books_5m, "--out", "reports", *wrong)
    assert ran.code == {type(None): 2, KeyboardInterrupt: 130}.get(type(raised), 1)
    assert [path.name for path in Path("reports").iterdir()] == ["junit.xml"]
    told = Path("reports/junit.xml").read_text()
    assert "<error" in told and re.search(r"QL\d{4}", ran.lines[-1])[0] in told  # type: ignore[index]


def test_a_refused_run_leaves_no_cache(evaluate: Any, copied: Path, here: Path) -> None:
    (copied / "tokenizer.json").unlink()
    assert evaluate(copied).code == 4
    assert not (here / "cache").exists()


def test_interrupted_runs_say_so(evaluate: Any, books_5m: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantlab.eval.run.run_candidate", stop)
    ran = evaluate(books_5m)
    assert ran.code == 130 and "stopped; no report was written" in ran.lines[-1]


def test_without_the_extra_tasks_say_what_to_install(
    evaluate: Any, books_5m: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.eval.extra.find_spec", lambda name: None)
    assert_refused(evaluate(books_5m, "--tasks", "piqa"), 3, "pip install 'quantlab[eval]'")
