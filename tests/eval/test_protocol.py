"""How text is cut: against the loops that other people run, and what makes two protocols different."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from quantlab.errors import TextError, UsageError
from quantlab.eval.options import ProtocolName
from quantlab.eval.protocol import Cut, Windows, count_words, make_windows, tokenizer_digest
from quantlab.text import Tokenizer

TEXT = "It was the best of times, it was the worst of times: caf\u00e9s and \u4e2d\u6587. " * 40


def cut(protocol: ProtocolName = "gptq", window: int = 32, tokens: int | None = None) -> Cut:
    return Cut(protocol, window, tokens, "a" * 64, "float32")


def windows_of(tokenizer: Tokenizer, how: Cut, text: str = TEXT) -> Windows:
    return make_windows(text, tokenizer, how, "a.txt")


@pytest.fixture
def with_bos(books_tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer as families have it that begin every document with BOS."""
    return replace(books_tokenizer, prefix=(1,))


def test_gptq_windows_are_those_of_the_loop_that_everybody_runs(books_tokenizer: Tokenizer, books_5m: Path) -> None:
    ids = AutoTokenizer.from_pretrained(books_5m)(TEXT, return_tensors="pt").input_ids
    wanted = [ids[0, i * 32 : (i + 1) * 32] for i in range(ids.numel() // 32)]
    found = windows_of(books_tokenizer, cut())
    assert len(found.rows) == len(wanted) > 10
    assert all(torch.equal(row, other) for row, other in zip(found.rows, wanted, strict=True))
    assert (found.protocol.name, found.protocol.bos) == ("gptq-32", "none")
    assert found.protocol.tokens == 31 * len(wanted)


def test_gptq_puts_bos_once_at_the_very_start(with_bos: Tokenizer) -> None:
    found = windows_of(with_bos, cut())
    assert found.rows[0][0] == 1
    assert torch.cat(found.rows).tolist() == [1, *with_bos.encode(TEXT)][: 32 * len(found.rows)]
    assert found.protocol.bos == "once"


def test_rolling_windows_are_those_of_lm_eval(books_tokenizer: Tokenizer) -> None:
    harness = pytest.importorskip("lm_eval.utils")
    ids = books_tokenizer.encode(TEXT)
    windows = harness.get_rolling_token_windows(ids, 1, 32, 1)
    wanted = [(context + targets, len(targets)) for context, targets in map(harness.make_disjoint_window, windows)]
    assert len(ids) % 32, "the last window must be shorter for this test to see it"
    found = windows_of(books_tokenizer, cut("rolling"))
    assert [(row.tolist(), length) for row, length in zip(found.rows, found.lengths, strict=True)] == wanted
    assert found.protocol.tokens == len(ids)
    assert found.protocol.words == len(TEXT.split(" "))
    assert found.protocol.bytes == len(TEXT.encode())


def test_rolling_without_bos_begins_with_the_end_of_the_text_before(books_tokenizer: Tokenizer) -> None:
    assert windows_of(replace(books_tokenizer, bos_id=None), cut("rolling")).rows[0][0] == books_tokenizer.eos_id
    with pytest.raises(UsageError, match="neither BOS nor EOS"):
        windows_of(replace(books_tokenizer, bos_id=None, eos_id=None), cut("rolling"))


@pytest.mark.parametrize("protocol", ["gptq", "rolling"])
def test_bytes_are_those_of_the_scored_tokens(protocol: ProtocolName, books_tokenizer: Tokenizer) -> None:
    found = windows_of(books_tokenizer, cut(protocol, tokens=200))
    scored = [t for row, n in zip(found.rows, found.lengths, strict=True) for t in row[-n:].tolist()]
    alone = sum(len(books_tokenizer.backend.convert_ids_to_tokens(token)) for token in scored)  # one character a byte
    assert found.protocol.bytes == pytest.approx(alone, rel=0.02)
    assert found.protocol.tokens == len(scored)


def test_a_limit_takes_the_first_tokens(books_tokenizer: Tokenizer) -> None:
    found = windows_of(books_tokenizer, cut(tokens=100))
    assert torch.cat(found.rows).tolist() == books_tokenizer.encode(TEXT)[:96]


def test_too_little_text_says_how_much_there_is(books_tokenizer: Tokenizer) -> None:
    with pytest.raises(TextError, match="4 tokens of text do not fill one window of 32") as caught:
        windows_of(books_tokenizer, cut(), "hello world")
    assert caught.value.where == "a.txt"


def test_batches_keep_the_order_and_never_mix_lengths(books_tokenizer: Tokenizer) -> None:
    found = windows_of(books_tokenizer, cut("rolling"))
    batches = found.batches(4)
    assert [index for batch in batches for index in batch] == list(range(len(found.rows)))
    assert max(len(batch) for batch in batches) == 4
    assert list(batches[-1]) == [len(found.rows) - 1]
    assert all(len({found.lengths[index] for index in batch}) == 1 for batch in batches)


def test_anything_that_changes_the_scores_changes_the_digest(books_tokenizer: Tokenizer, with_bos: Tokenizer) -> None:
    protocols = [
        windows_of(books_tokenizer, cut()).protocol,
        windows_of(books_tokenizer, cut("rolling")).protocol,
        windows_of(books_tokenizer, cut(window=64)).protocol,
        windows_of(books_tokenizer, cut(tokens=100)).protocol,
        windows_of(books_tokenizer, replace(cut(), dtype="bfloat16")).protocol,
        windows_of(books_tokenizer, cut(), TEXT + "!").protocol,
        windows_of(with_bos, cut()).protocol,
        windows_of(books_tokenizer, replace(cut(), tokenizer="b" * 64)).protocol,
    ]
    assert len({protocol.digest for protocol in protocols}) == len(protocols)
    assert windows_of(books_tokenizer, cut()).protocol == protocols[0]


def test_a_tokenizer_is_known_by_what_it_does(books_5m: Path, books_tokenizer: Tokenizer, with_bos: Tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(books_5m)
    other.backend_tokenizer.enable_truncation(512)
    assert tokenizer_digest(replace(books_tokenizer, backend=other)) == tokenizer_digest(books_tokenizer)
    assert tokenizer_digest(with_bos) != tokenizer_digest(books_tokenizer)
    # What an empty context begins with, and where an answer ends.
    for changed in (replace(books_tokenizer, bos_id=7), replace(books_tokenizer, eos_id=7)):
        assert tokenizer_digest(changed) != tokenizer_digest(books_tokenizer)
    other.add_tokens(["quantlab"])
    assert tokenizer_digest(replace(books_tokenizer, backend=other)) != tokenizer_digest(books_tokenizer)


def test_words_are_counted_as_lm_eval_counts_them() -> None:
    assert [count_words(text) for text in ("one two", "one  two\n", "one")] == [2, 3, 1]
