"""Items from JSON lines: every one of them, or the line that is none."""

import pytest

from quantlab.errors import UsageError
from quantlab.eval import task_data
from quantlab.eval.task_data import loader, read_items


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one\u2028two\u0085three"}\n\n  \n{"a": "\u00e9"}', encoding="utf-8")
    assert read_items(path) == [{"a": "one\u2028two\u0085three"}, {"a": "é"}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"a": 1}\n{"a": }\n', ":2: not JSON"),
        (b'{"a": 1}\n[1]\n', ":2: an item is a JSON object"),
        (b"[" * 100_000, ":1: not JSON"),
        (b"\n\n", "the file holds no items"),
        (b"", "the file holds no items"),
        (b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
    ],
)
def test_what_is_no_item_is_named(tmp_path, content, told):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_items(path)
    assert f"{path}" in error.value.one_line()
    assert told in error.value.one_line()


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    monkeypatch.setattr(task_data, "MAX_BYTES", 4)
    with pytest.raises(UsageError, match="larger than 4 bytes"):
        read_items(path)


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_items(tmp_path / "absent.jsonl")


def test_the_files_of_a_split_are_read_end_to_end(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"name": "{name}"}}\n')
    tables = loader({"test": [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "train": [tmp_path / "b.jsonl"]})(
        version=1.0
    )
    assert {split: table["name"][:] for split, table in tables.items()} == {"test": ["a", "b"], "train": ["b"]}


def test_items_that_do_not_fit_one_table_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "b": 2}\n{"a": 1, "c": 2}\n')
    with pytest.raises(UsageError, match="item 2 and the first differ in their keys: b, c"):
        loader({"test": [path]})
    path.write_text('{"a": 1}\n{"a": ["x"]}\n')
    with pytest.raises(UsageError, match="the items' values do not fit one table"):
        loader({"test": [path]})
    path.write_text('{"a": "\\ud800"}\n')
    with pytest.raises(UsageError, match="the items' values do not fit one table"):
        loader({"test": [path]})
