"""Kept outcomes: exactly what was kept, or nothing."""

import hashlib
import json
import os

import pytest

from quantlab.errors import OutputError
from quantlab.eval.outcome_cache import TaskEntry, TaskKey, load_entry, store_entry
from quantlab.eval.outcomes import TaskOutcome
from quantlab.eval.result import TaskNoise

KEY = TaskKey(weights="a" * 64, tokenizer="b" * 64, data="c" * 64, dtype="float32", machine="cpu")
OUTCOME = TaskOutcome(
    task="quiz",
    metric="acc",
    data="c" * 64,
    items=("0" * 32, "1" * 32),
    right=(1, 0),
    answers=("é", "b"),
    prompts=("p", "q"),
)
ENTRY = TaskEntry(key=KEY, outcome=OUTCOME, noise=TaskNoise(name="quiz", items=2, flips=0))


def test_what_was_kept_is_found_again(tmp_path):
    store_entry(tmp_path, ENTRY)
    assert load_entry(tmp_path, KEY) == ENTRY
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == [KEY.file(tmp_path).name]


@pytest.mark.parametrize("field", ["weights", "tokenizer", "data"])
def test_another_digest_is_another_entry(tmp_path, field):
    store_entry(tmp_path, ENTRY)
    assert load_entry(tmp_path, KEY.model_copy(update={field: "d" * 64})) is None


@pytest.mark.parametrize("field", ["dtype", "machine"])
def test_another_way_of_running_is_another_entry(tmp_path, field):
    store_entry(tmp_path, ENTRY)
    assert load_entry(tmp_path, KEY.model_copy(update={field: "other"})) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "cut", "key", "data", "right", "answer", "flips", "binary"])
def test_a_damaged_entry_is_none(tmp_path, damage):
    store_entry(tmp_path, ENTRY)
    file = KEY.file(tmp_path)
    kept = json.loads(file.read_text())
    whole = kept["entry"]
    changed = {
        "cut": file.read_text()[:-40],
        "key": {"key": whole["key"] | {"dtype": "bfloat16"}},
        "data": {"outcome": whole["outcome"] | {"data": "d" * 64}},
        "right": {"outcome": whole["outcome"] | {"right": [1, 7]}},
        "answer": {"outcome": whole["outcome"] | {"right": [1, 1]}},
        "flips": {"noise": whole["noise"] | {"flips": 1}},
        "binary": "\x00" * 100,
    }
    found = changed.get(damage, damage)
    file.write_text(found if isinstance(found, str) else json.dumps(kept | {"entry": whole | found}))
    assert load_entry(tmp_path, KEY) is None
    store_entry(tmp_path, ENTRY)
    assert load_entry(tmp_path, KEY) == ENTRY


def test_a_link_out_of_the_cache_is_not_followed(tmp_path):
    store_entry(tmp_path / "other", ENTRY)
    (tmp_path / "tasks").mkdir()
    KEY.file(tmp_path).symlink_to(KEY.file(tmp_path / "other"))
    assert load_entry(tmp_path, KEY) is None


def test_a_disk_that_refuses_leaves_the_old_entry(tmp_path, monkeypatch):
    store_entry(tmp_path, ENTRY)
    before = hashlib.sha256(KEY.file(tmp_path).read_bytes()).digest()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="the disk is full") as error:
        store_entry(tmp_path, ENTRY)
    assert error.value.fix == "--cache DIR on another disk, or --no-cache"
    assert hashlib.sha256(KEY.file(tmp_path).read_bytes()).digest() == before
    assert len(list((tmp_path / "tasks").iterdir())) == 1
