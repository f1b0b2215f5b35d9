"""The whole command on a real model: what it writes, what the dry run had said, and bad input found on the way."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("quantlab.quant.run")

FAST = ("--quality", "fast", "--samples", "4", "--seq-len", "64", "--device", "cpu")


@pytest.fixture
def books(here: Path, books_5m: Path) -> Path:
    """A copy of the shipped model that a test may damage."""
    return Path(shutil.copytree(books_5m, here / "books"))


def digests(folder: Path) -> dict[str, str]:
    """Every file under `folder` with its sha256."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("options", [(), ("--scheme", "w8a8"), ("--group-size", "32", "--asymmetric")], ids=" ".join)
def test_output_is_to_the_byte_what_the_dry_run_said(options: tuple[str, ...], cli: Any, books: Path) -> None:
    line = ("quantize", books, "--out", "out", *FAST, *options, "--max-shard-size", "2MB")
    planned = json.loads(cli(*line, "--dry-run", "--json").out)
    ran = cli(*line, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    written = {str(path.relative_to("out")): path.stat().st_size for path in Path("out").rglob("*") if path.is_file()}
    assert written.pop("quantlab_report.json") > 0
    assert written == {file["name"]: file["bytes"] for file in planned["files"]}
    assert told["bits_per_weight"] == pytest.approx(planned["bits_per_weight"], rel=1e-3)
    inspected = cli("inspect", "out", "--json")
    assert inspected.code == 0, inspected.err
    assert json.loads(inspected.out)["quantized_bits_per_weight"] == pytest.approx(planned["bits_per_weight"])


def test_existing_output_is_replaced_only_with_force(cli: Any, books: Path) -> None:
    assert cli("quantize", books, "--out", "out", *FAST).code == 0
    before = digests(Path("out"))
    assert cli("quantize", books, "--out", "out", *FAST).code == 7
    assert digests(Path("out")) == before
    assert cli("quantize", books, "--out", "out", *FAST, "--seed", "1", "--force").code == 0
    assert digests(Path("out")) != before


def test_source_is_left_as_it_was(cli: Any, books: Path) -> None:
    before = digests(books)
    assert cli("quantize", books, "--out", "out", *FAST).code == 0
    assert digests(books) == before


def test_a_run_cut_off_with_its_output_in_place_ends_well_when_it_is_started_again(
    cli: Any, books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(journal: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quantlab.quant.journal.Journal.remove", cut)
        assert cli("quantize", books, "--out", "out", *FAST).code == 130
    before = digests(Path("out"))
    assert Path(".out.quantlab").exists()
    assert cli("quantize", books, "--out", "out", *FAST, "--seed", "1").code == 7
    assert cli("quantize", books, "--out", "out", *FAST, "--restart").code == 7
    ran = cli("quantize", books, "--out", "out", *FAST, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["modules"] == 28
    assert digests(Path("out")) == before and not Path(".out.quantlab").exists()
    assert cli("quantize", books, "--out", "out", *FAST).code == 7


def assert_refused(cli: Any, arguments: tuple[object, ...], code: int, fragment: str) -> None:
    """A run that fails with one line and leaves nothing under the output's name."""
    ran = cli("quantize", *arguments, "--out", "out")
    assert ran.code == code, ran.err
    assert len(ran.lines) == 1, ran.err
    assert fragment in ran.lines[0]
    assert ran.out == ""
    assert not Path("out").exists()


@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\xff"], ids=["NaN", "-Inf"])
def test_weight_that_is_not_finite_is_refused(bits: bytes, cli: Any, books: Path) -> None:
    path = books / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    name = "model.layers.0.self_attn.q_proj.weight"
    start = 8 + length + json.loads(bytes(data[8 : 8 + length]))[name]["data_offsets"][0]
    data[start : start + 2] = bits
    path.write_bytes(data)
    assert_refused(cli, (books, *FAST), 4, name)


def test_missing_tokenizer_is_refused(cli: Any, books: Path) -> None:
    (books / "tokenizer.json").unlink()
    assert_refused(cli, (books, *FAST), 4, "books")


def test_broken_tokenizer_is_refused(cli: Any, books: Path) -> None:
    (books / "tokenizer.json").write_text("{")
    assert_refused(cli, (books, *FAST), 4, "books")


TEXTS: dict[str, tuple[str, bytes, str]] = {
    "too short": ("short.txt", b"only a few words", "short.txt"),
    "empty": ("empty.txt", b"", "empty.txt"),
    "not UTF-8": ("latin.txt", b"caf\xe9 " * 1000, "latin.txt"),
    "broken JSON line": ("rows.jsonl", b'{"text": "a"}\n{"text"\n', "rows.jsonl"),
    "rows without text": ("rows.jsonl", b'{"body": "a"}\n' * 50, "rows.jsonl"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_bad_calibration_text_is_refused(kind: str, cli: Any, books: Path, here: Path) -> None:
    name, content, fragment = TEXTS[kind]
    (here / name).write_bytes(content)
    assert_refused(cli, (books, *FAST, "--calibration", name), 6, fragment)


def test_folder_without_text_is_refused(cli: Any, books: Path, here: Path) -> None:
    (here / "texts").mkdir()
    assert_refused(cli, (books, *FAST, "--calibration", "texts"), 6, "texts")


def test_device_that_is_not_there_is_refused(cli: Any, books: Path) -> None:
    assert_refused(cli, (books, "--quality", "fast", "--samples", "4", "--device", "cuda:77"), 2, "cuda:77")
