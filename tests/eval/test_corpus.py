"""Evaluation text: found, named, read, and refused in one line that names the file."""

from pathlib import Path

import pytest

from quantlab.errors import TextError, UsageError
from quantlab.eval.corpus import BUNDLED, TextSource, find_texts, read_text


def test_without_a_text_the_bundled_one_is_taken(evaluation_text: Path) -> None:
    (source,) = find_texts([])
    assert source == TextSource(BUNDLED, (evaluation_text,))
    assert read_text(source) == evaluation_text.read_text()


def test_a_folder_is_one_text_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "two books"
    folder.mkdir()
    for name, text in (("b.txt", "second"), ("a.md", "first "), ("notes.pdf", "no text"), ("c.raw", " third")):
        (folder / name).write_text(text)
    (source,) = find_texts([folder])
    assert source.name == "two_books"
    assert read_text(source) == "first second third"


def test_a_name_is_a_plain_word_that_a_gate_can_use(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text("text")
    assert find_texts([path])[0].name == "wiki_test"


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="two texts are called 'a'"):
        find_texts([tmp_path / "one" / "a.txt", tmp_path / "two" / "a.txt"])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert read_text(find_texts([tmp_path / "a.txt"])[0]) == "word"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("empty.txt", b"", "the text is empty"),
        ("blank.txt", b" \n\n\t", "the text is empty"),
        ("latin.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
    ],
)
def test_what_is_not_text_is_refused_by_name(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=reason) as caught:
        read_text(find_texts([tmp_path / name])[0])
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.exit_code == 6


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="holds no .txt, .raw, .md file"):
        find_texts([tmp_path])


def test_a_text_beyond_all_patience_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(TextError, match="over the limit"):
        read_text(find_texts([tmp_path / "huge.txt"])[0])
