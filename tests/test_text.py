"""The tokenizer wrapper: same ids as the tokenizer itself, chats through its template, refusals in one line."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab import text as subject
from quantlab.errors import CheckpointError
from quantlab.text import Tokenizer, load_tokenizer, split_words

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"


def make_tokenizer(folder: Path, source: Path, changes: dict, frame: bool = False) -> Tokenizer:
    """A copy of the shipped tokenizer with other settings; `frame` puts BOS before and EOS after each document."""
    folder.mkdir()
    config = json.loads((source / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    body = json.loads((source / "tokenizer.json").read_text())
    if frame:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<s>", 1), ("</s>", 2))}
        single.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        body["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens,
        }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(body))
    return load_tokenizer(folder)


def test_long_text_has_the_ids_of_one_call(
    books_tokenizer: Tokenizer, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = calibration_text.read_text()[:60_000]
    whole = books_tokenizer.backend.encode(text, add_special_tokens=False)
    monkeypatch.setattr(subject, "PIECE_CHARS", 500)
    assert len(list(split_words(text, 500))) > 50
    assert books_tokenizer.encode(text) == whole


@given(st.text(alphabet="ab \n\té中.", max_size=200), st.integers(1, 50))
def test_pieces_join_to_the_text(text: str, limit: int) -> None:
    pieces = list(split_words(text, limit))
    assert "".join(pieces) == text
    assert all(piece.startswith(" ") for piece in pieces[1:])


def test_text_without_spaces_stays_whole() -> None:
    assert list(split_words("中" * 100, 10)) == ["中" * 100]


def test_decode_inverts_encode(books_tokenizer: Tokenizer) -> None:
    text = "It was a bright, cold day.\n\nSo they say -- 42 of them."
    assert books_tokenizer.decode(books_tokenizer.encode(text)) == text


def test_special_tokens_are_those_of_the_tokenizer(tmp_path: Path, books_5m: Path, books_tokenizer: Tokenizer) -> None:
    assert books_tokenizer.encode("hello", special_tokens=True) == books_tokenizer.encode("hello")
    framed = make_tokenizer(tmp_path / "t", books_5m, {}, frame=True)
    assert framed.encode("hello", special_tokens=True) == [1, *framed.encode("hello"), 2]
    assert framed.encode("hello", special_tokens=True) == framed.backend.encode("hello")


def test_ids_of_bos_and_eos(books_tokenizer: Tokenizer) -> None:
    assert (books_tokenizer.bos_id, books_tokenizer.eos_id) == (1, 2)


def test_chats_go_through_the_template(tmp_path: Path, books_5m: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", books_5m, {"chat_template": TEMPLATE})
    rendered = tokenizer.render_chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    assert rendered == "<|user|>hi<|end|><|assistant|>yes<|end|>"
    assert tokenizer.encode(rendered)[0] == 4  # one special token, not its letters


def test_a_missing_template_is_named(books_tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        books_tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_is_one_line(tmp_path: Path, books_5m: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "t", books_5m, {"chat_template": "{{ raise_exception('no system role') }}"})
    with pytest.raises(CheckpointError, match="no system role"):
        tokenizer.render_chat([{"role": "system", "content": "hi"}])


def test_a_template_cannot_reach_the_interpreter(tmp_path: Path, books_5m: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = make_tokenizer(tmp_path / "t", books_5m, {"chat_template": escape})
    with pytest.raises(CheckpointError, match="refuses"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in caught.value.one_line()
    assert str(tmp_path) in caught.value.one_line()


def test_a_damaged_tokenizer_is_refused(tmp_path: Path, books_5m: Path) -> None:
    shutil.copy(books_5m / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_not_run(tmp_path: Path, books_5m: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    with contextlib.suppress(CheckpointError):
        make_tokenizer(tmp_path / "t", books_5m, changes)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_is_read_without_the_code_of_its_model(books_5m: Path) -> None:
    code = f"import sys, quantlab.text as t; from pathlib import Path; t.load_tokenizer(Path({str(books_5m)!r}))"
    code += "; print([name for name in sys.modules if name.startswith(('transformers.models.llama', 'accelerate'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
