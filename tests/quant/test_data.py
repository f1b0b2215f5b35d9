"""Calibration blocks: packing, sampling and every source, on real files."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet

from quantlab.bundled import bundled_text
from quantlab.errors import CalibrationError
from quantlab.quant import data, documents
from quantlab.quant.data import Blocks, load_blocks, pack
from quantlab.quant.documents import read_documents
from quantlab.quant.options import CalibrationSpec
from quantlab.text import Tokenizer, load_tokenizer

SEQ_LEN = 32
EOS = 2


def spec(source: Path | str | None, samples: int | None = None, seed: int = 0, field: str | None = None):
    return CalibrationSpec(source=source and str(source), field=field, samples=samples, seq_len=SEQ_LEN, seed=seed)


def rows(path: Path, values: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    return path


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("\n".join(f"In the year {year} the ship came home again." for year in range(1700, 1800)))
    return path


def test_the_bundled_text_gives_the_default_blocks(books_tokenizer: Tokenizer) -> None:
    blocks = load_blocks(CalibrationSpec(), books_tokenizer)
    assert blocks.ids.shape == (64, 1024)
    assert blocks.ids.dtype == torch.int64
    assert blocks.available >= 64
    path = bundled_text("calibration")
    assert path is not None and path.read_text()[:200].strip()


def test_all_blocks_together_are_the_text(story: Path, books_tokenizer: Tokenizer) -> None:
    ids = books_tokenizer.encode(story.read_text())
    blocks = load_blocks(spec(story), books_tokenizer)
    expected = [ids[i : i + SEQ_LEN] for i in range(0, len(ids) - SEQ_LEN + 1, SEQ_LEN)]
    assert sorted(blocks.ids.tolist()) == sorted(expected)
    assert blocks.available == len(expected)


def test_samples_are_drawn_without_replacement(story: Path, books_tokenizer: Tokenizer) -> None:
    every = {tuple(row) for row in load_blocks(spec(story), books_tokenizer).ids.tolist()}
    drawn = [tuple(row) for row in load_blocks(spec(story, samples=12), books_tokenizer).ids.tolist()]
    assert len(set(drawn)) == 12
    assert set(drawn) <= every


def test_the_seed_decides_the_draw(story: Path, books_tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> Blocks:
        return load_blocks(spec(story, samples=12, seed=seed), books_tokenizer)

    assert torch.equal(draw(3).ids, draw(3).ids)
    assert draw(3).digest == draw(3).digest
    assert draw(3).digest != draw(4).digest


def test_the_digest_is_that_of_the_ids(story: Path, books_tokenizer: Tokenizer) -> None:
    blocks = load_blocks(spec(story, samples=2), books_tokenizer)
    assert blocks.digest == hashlib.sha256(blocks.ids.numpy().tobytes()).hexdigest()


def test_too_little_text_names_both_numbers(story: Path, books_tokenizer: Tokenizer) -> None:
    held = len(books_tokenizer.encode(story.read_text()))
    with pytest.raises(CalibrationError) as caught:
        load_blocks(spec(story, samples=500), books_tokenizer)
    line = caught.value.one_line()
    assert str(held) in line
    assert str(500 * SEQ_LEN) in line
    assert "--samples" in line


def test_an_empty_file_is_too_little(tmp_path: Path, books_tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="holds 0 tokens"):
        load_blocks(spec(tmp_path / "empty.txt"), books_tokenizer)


def test_documents_are_joined_by_one_eos_and_padded_by_nothing(books_tokenizer: Tokenizer) -> None:
    first, second = books_tokenizer.encode("One day."), books_tokenizer.encode("Another.")
    packed = pack(["One day.", "", "Another."], books_tokenizer, limit=1000)
    assert packed.tolist() == [*first, EOS, *second]


def test_packing_stops_at_the_limit(books_tokenizer: Tokenizer) -> None:
    endless = iter(lambda: "word " * 50, None)
    assert len(pack(endless, books_tokenizer, limit=333)) == 333


def test_json_lines_survive_line_separators_inside_strings(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [{"text": "a\u2028b"}, {"text": "c\x85d"}])
    path.write_bytes(path.read_bytes() + b"\n\n")
    assert list(read_documents(str(path), None, None)) == ["a\u2028b", "c\x85d"]


def test_json_lines_take_another_field(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [{"body": "x", "text": "y"}])
    assert list(read_documents(str(path), None, "body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"body": "x"}', "no field 'text' or 'messages'; there is: body"),
        ('{"text": 3}', "neither text nor a list"),
        ('{"text": ["a"]}', "neither text nor a list"),
        ('{"messages": [{"role": "user"}]}', "neither text nor a list"),
        ("{broken", "not a line of JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("[" * 100_000, "not a line of JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError) as caught:
        list(read_documents(str(tmp_path / "a.jsonl"), None, None))
    assert reason in caught.value.one_line()
    assert "a.jsonl:2" in caught.value.one_line()


def test_a_missing_field_suggests_the_option(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(CalibrationError, match="no field 'body'; there is: text") as caught:
        list(read_documents(str(path), None, "body"))
    assert caught.value.fix == "--field NAME"


def test_chats_go_through_the_template(tmp_path: Path, books_tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = rows(tmp_path / "chat.jsonl", [{"messages": chat, "text": "unused"}])
    assert list(read_documents(str(path), None, None)) == [chat]
    with pytest.raises(CalibrationError, match="no chat template"):
        load_blocks(spec(path), books_tokenizer)


def test_a_chat_is_packed_as_rendered(books_5m: Path, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((books_5m / name).read_bytes())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(folder)
    packed = pack([[{"role": "user", "content": "hi"}]], tokenizer, limit=100)
    assert packed.tolist() == tokenizer.encode("<|user|>hi")


def test_parquet_gives_the_rows_in_order(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(600)]
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(600))}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"), None, None)) == texts


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CalibrationError, match="not a readable Parquet file"):
        list(read_documents(str(tmp_path / "a.parquet"), None, None))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "notes.md").write_text("ignored")
    rows(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "sub" / "c.txt").write_text("third")
    assert list(read_documents(str(tmp_path), None, None)) == ["first", "second", "third"]


def test_a_folder_with_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CalibrationError, match="holds no .txt, .jsonl, .parquet file"):
        list(read_documents(str(tmp_path), None, None))


def test_other_files_are_refused_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(CalibrationError, match=r"cannot read \.csv"):
        list(read_documents(str(tmp_path / "a.csv"), None, None))


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/no/such/place", "a/b/c", "what is this"])
def test_a_path_that_is_not_there_is_not_taken_for_a_dataset(name: str) -> None:
    with pytest.raises(CalibrationError, match="no such file, folder or dataset id"):
        list(read_documents(name, None, None))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        list(read_documents(str(tmp_path / "a.txt"), None, None))


def stub_hub(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[tuple]:
    """Answer for the hub with the real streaming reader on a local file; returns the calls made."""
    calls = []
    inner = datasets.load_dataset

    def load(name: str, config: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        calls.append((name, config, split, streaming))
        return inner("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(documents.datasets, "load_dataset", load)
    return calls


def test_a_dataset_id_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub_hub(monkeypatch, rows(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y"}]))
    assert list(read_documents("owner/name:config", "validation", None)) == ["x", "y"]
    assert calls == [("owner/name", "config", "validation", True)]


def test_a_stream_is_read_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, books_tokenizer: Tokenizer
) -> None:
    stub_hub(monkeypatch, rows(tmp_path / "a.jsonl", [{"text": "word " * 40}] * 2000))
    blocks = load_blocks(spec("owner/name", samples=2), books_tokenizer)
    assert blocks.available == 2 * data.STREAM_FACTOR


def test_a_dataset_out_of_reach_is_one_line(repository: Path) -> None:
    script = (
        "from quantlab.errors import CalibrationError\nfrom quantlab.quant.documents import read_documents\n"
        "try: list(read_documents('owner/name', None, None))\nexcept CalibrationError as e: print(e.one_line())"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{repository}:{repository / 'kernels'}",
        "HOME": "/nonexistent",
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("QL0601 owner/name: cannot stream split 'train'")
    assert done.stdout.count("\n") == 1
