"""Text given out token by token is the tokenizer's own; stop strings are found wherever the borders are."""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantlab.detokenizer import ByteDetokenizer, StopStrings, TextStream, WindowDetokenizer, detokenizer
from quantlab.text import Tokenizer
from quantlab.token_bytes import TokenBytes, token_bytes
from tests.tokenizers_at_hand import BYTES, byte_level, sentence_piece_like, word_piece


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, books_tokenizer: Tokenizer) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": byte_level(folder / "byte"),
        "sentence-piece": sentence_piece_like(folder / "piece"),
        "gemma-like": sentence_piece_like(folder / "gemma", strip=False),
        "books": books_tokenizer,
    }


def own(tokenizer: Tokenizer, ids: Sequence[int], skip_special: bool = True) -> str:
    """The tokenizer's own text of all the ids."""
    return tokenizer.backend.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


@cache
def bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    return token_bytes(tokenizer)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip_special: bool = True) -> str:
    stream = detokenizer(tokenizer, bytes_of(tokenizer), prompt, skip_special)
    return "".join([*map(stream.add, ids), stream.finish()])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 270), max_size=24), st.booleans(), st.sampled_from(["byte-level", "books"]))
@example([0xF0 - 0x21, 0x80], True, "byte-level")
def test_any_tokens_give_the_tokenizers_own_text(
    kinds: dict[str, Tokenizer], ids: list[int], skip_special: bool, kind: str
) -> None:
    """Random ids are mostly broken UTF-8: cut characters, lone and surplus bytes."""
    assert streamed(kinds[kind], ids, skip_special=skip_special) == own(kinds[kind], ids, skip_special)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 282), max_size=24), st.booleans(), st.sampled_from(["sentence-piece", "gemma-like"]))
def test_sentence_piece_tokens_give_the_tokenizers_own_text(
    kinds: dict[str, Tokenizer], ids: list[int], skip_special: bool, kind: str
) -> None:
    ids = [i for i in ids if i < BYTES or i >= BYTES + 0x80]  # the text of ASCII bytes is certain at once
    ids = [i if i < BYTES or i > BYTES + 0xFF else BYTES + (i - BYTES) % 0x80 for i in ids]
    assert streamed(kinds[kind], ids, skip_special=skip_special) == own(kinds[kind], ids, skip_special)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(BYTES, BYTES + 255), st.integers(BYTES + 256, 276)), max_size=12))
def test_byte_tokens_that_are_no_text_cost_their_own_bytes_only(kinds: dict[str, Tokenizer], ids: list[int]) -> None:
    """The tokenizer makes U+FFFD of every byte of a run that has a wrong one, even of characters given out by then."""
    tokenizer, expected = kinds["gemma-like"], ""
    for is_bytes, run in itertools.groupby(ids, lambda i: i < BYTES + 256):
        part = list(run)
        text = bytes(i - BYTES for i in part).decode("utf-8", "replace") if is_bytes else own(tokenizer, part)
        assert "\ufffd" in text or text == own(tokenizer, part)
        expected += text
    assert streamed(tokenizer, ids) == expected


TEXTS = st.text(alphabet="ab h\né日本😀𝄞<>0x▁\u0301\u200d\ufffd", max_size=30)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["byte-level", "sentence-piece", "gemma-like", "books"]))
def test_the_text_goes_on_where_the_prompt_ends(
    kinds: dict[str, Tokenizer], prompt: str, output: str, kind: str
) -> None:
    """Also where the prompt's last token ends inside a character; and no space is lost between the two."""
    tokenizer = kinds[kind]
    ids = tokenizer.encode(prompt + output)
    for cut in range(len(ids) + 1):
        given_out, before = streamed(tokenizer, ids[cut:], ids[:cut]), own(tokenizer, ids[:cut])
        assert own(tokenizer, ids).endswith(given_out)
        assert before.endswith("\ufffd") or before + given_out == own(tokenizer, ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8191), max_size=12), st.integers(0, 12))
def test_a_stream_holds_back_less_than_a_character(kinds: dict[str, Tokenizer], ids: list[int], cut: int) -> None:
    """Every piece that is given out is a beginning of the final text, at most three bytes behind."""
    tokenizer = kinds["books"]
    stream = detokenizer(tokenizer, bytes_of(tokenizer))
    early = "".join(map(stream.add, ids[:cut]))
    assert own(tokenizer, ids).startswith(early)
    assert len(own(tokenizer, ids[:cut])) - len(early) <= 1


def test_a_character_in_four_tokens_comes_whole(kinds: dict[str, Tokenizer]) -> None:
    tokenizer = kinds["sentence-piece"]
    stream = detokenizer(tokenizer, bytes_of(tokenizer), prompt_ids=[5])
    assert [stream.add(BYTES + byte) for byte in "𝄞".encode()] == ["", "", "", "𝄞"]
    assert [stream.add(BYTES + byte) for byte in "𝄞".encode()[:2]] == ["", ""]
    assert stream.add(tokenizer.backend.convert_tokens_to_ids("a")) == "\ufffda"
    assert stream.add(BYTES + 0xF0) == "" and stream.finish() == "\ufffd"


def test_ids_that_no_token_has_are_no_text(kinds: dict[str, Tokenizer]) -> None:
    """Models have more columns than tokenizers have tokens."""
    stream = detokenizer(kinds["books"], vocabulary := token_bytes(kinds["books"]))
    assert [stream.add(8192), stream.add(10**6), stream.finish()] == ["", "", ""]
    assert vocabulary.of(8192) == b"" == vocabulary.of(-1)


def test_the_bytes_of_tokens(kinds: dict[str, Tokenizer]) -> None:
    books = token_bytes(kinds["books"])
    ids = kinds["books"].encode("Straße, 日本 \U0001f600\n")
    assert b"".join(books.of(i) for i in ids).decode() == "Straße, 日本 \U0001f600\n"
    assert books.special == {*range(8)} and books.text(2) == "</s>"
    piece = token_bytes(kinds["sentence-piece"])
    assert piece.text(BYTES + 0xC3) == "\ufffd" and piece.of(BYTES + 0xC3) == b"\xc3"
    assert piece.leading_spaces == 1 and token_bytes(kinds["gemma-like"]).leading_spaces == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=12), st.lists(st.integers(0, 11), max_size=4))
def test_tokens_that_depend_on_the_one_before_are_decoded_in_windows(
    words: Tokenizer, ids: list[int], prompt: list[int]
) -> None:
    vocabulary = token_bytes(words)
    assert not vocabulary.joined
    assert isinstance(detokenizer(words, vocabulary), WindowDetokenizer)
    prompt = prompt or [3]
    assert own(words, prompt) + streamed(words, ids, prompt) == own(words, [*prompt, *ids])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return word_piece(tmp_path_factory.mktemp("words"))


def test_windows_do_not_wait_forever_for_a_character(kinds: dict[str, Tokenizer]) -> None:
    stream = WindowDetokenizer(kinds["byte-level"], [5])
    texts = [stream.add(kinds["byte-level"].encode("\U0001f600")[0]) for _ in range(20)]
    assert "\ufffd" in "".join(texts)
    assert "".join(texts) + stream.finish() == "\ufffd" * 20


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.text("abc", max_size=20), STOPS, st.data())
def test_a_stop_string_is_found_across_any_borders(text: str, stops: list[str], data: st.DataObject) -> None:
    """By definition: the stop that is complete first, the longest of those; text before it, nothing after."""
    ends = [(at + len(stop), at, stop) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    expected = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher, given_out, found = StopStrings(stops), "", None
    for start, stop_at in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, found = matcher.add(text[start:stop_at])
        given_out += piece
        assert expected[0].startswith(given_out), "nothing given out is ever part of a stop string"
        if found:
            break
        assert len(matcher.held) < max(map(len, stops))
    assert (given_out + matcher.finish(), found) == expected


def stream_of(tokenizer: Tokenizer, stops: Sequence[str], min_tokens: int = 0) -> TextStream:
    return TextStream(detokenizer(tokenizer, bytes_of(tokenizer)), stops, min_tokens)


def test_a_stream_ends_at_a_stop_string_inside_and_across_tokens(books_tokenizer: Tokenizer) -> None:
    ids = books_tokenizer.encode("One fine day. User: what?")
    stream = stream_of(books_tokenizer, ["\nUser:", "User:"])
    deltas = [stream.add([i]) for i in ids]
    last = next(i for i, delta in enumerate(deltas) if delta.stop)
    assert "".join(delta.text for delta in deltas[: last + 1]) == "One fine day. " and deltas[last].stop == "User:"
    at_once = stream_of(books_tokenizer, ["\nUser:", "User:"]).add(ids)
    assert at_once.text == "One fine day. " and at_once.tokens == last + 1 < len(ids)
    assert len(at_once.offsets) == at_once.tokens


def test_text_held_back_comes_when_the_output_ends(books_tokenizer: Tokenizer) -> None:
    stream = stream_of(books_tokenizer, ["day after"])
    text = stream.add(books_tokenizer.encode("One fine day")).text
    assert text == "One fine " and stream.finish().text == "day"


def test_offsets_are_where_each_token_begins(books_tokenizer: Tokenizer) -> None:
    ids = books_tokenizer.encode("Straße 日本 and \U0001f600 so on")
    delta = stream_of(books_tokenizer, []).add(ids)
    for i, offset in enumerate(delta.offsets):
        assert offset == len(own(books_tokenizer, ids[:i]).rstrip("\ufffd"))


def test_stop_strings_wait_for_the_least_number_of_tokens(books_tokenizer: Tokenizer) -> None:
    ids = books_tokenizer.encode("stop stop stop go")
    assert len(ids) >= 4
    assert stream_of(books_tokenizer, ["stop"]).add(ids).text == ""
    delta = stream_of(books_tokenizer, ["stop"], min_tokens=3).add(ids)
    assert delta.stop == "stop" and delta.text.startswith("stop") and delta.tokens >= 3


def test_an_incomplete_character_can_complete_a_stop_string(kinds: dict[str, Tokenizer]) -> None:
    stream = stream_of(kinds["byte-level"], ["\ufffd"])
    assert stream.add(kinds["byte-level"].encode("\U0001f600")[:1]).text == ""
    assert stream.finish().stop == "\ufffd"


def test_empty_stop_strings_stop_nothing() -> None:
    assert StopStrings(["", ""]).add("text") == ("text", None)


def test_the_byte_detokenizer_refuses_a_vocabulary_that_is_not_bytes() -> None:
    with pytest.raises(AssertionError):
        ByteDetokenizer(TokenBytes((b"a",), frozenset(), joined=False))


def test_the_bytes_of_a_tokenizer_are_read_from_its_folder_alone(tmp_path: Path) -> None:
    assert token_bytes(byte_level(tmp_path)).of(0) == b"!"
