"""An engine as whoever answers tasks: the same scores and texts as the plain model's, and the same refusals."""

import math
from pathlib import Path

import pytest

from quantlab.errors import NumericsError, UsageError
from quantlab.eval.answers import PlainAnswers
from quantlab.eval.likelihood import Request
from quantlab.eval.served_answers import ServedAnswers
from quantlab.models.decoder import CausalLM
from quantlab.runtime.build import build_engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import TokenEvent, TokenLogprobs
from quantlab.text import Tokenizer


@pytest.fixture(scope="module")
def served(books_5m: Path) -> ServedAnswers:
    options = EngineOptions(device="cpu", dtype="float32", max_model_len=128, max_num_seqs=3, max_batch_tokens=48)
    return ServedAnswers(build_engine(books_5m, options))


@pytest.fixture(scope="module")
def plain(books_model: CausalLM) -> PlainAnswers:
    return PlainAnswers(books_model, 3)


def quiet(done: int, total: int) -> None:
    pass


def test_continuations_score_as_in_plain_torch(served, plain, books_tokenizer: Tokenizer) -> None:
    start = books_tokenizer.encode("The captain looked at the")
    ends = [books_tokenizer.encode(text) for text in (" sea", " sea and at the sky", " zebra", " mast, and then away")]
    requests = [Request([1], start)] + [Request(start, end) for end in ends]
    told: list[tuple[int, int]] = []
    found = served.score(requests, lambda done, total: told.append((done, total)))
    assert told == [(done, len(requests)) for done in range(1, len(requests) + 1)]
    for mine, wanted in zip(found, plain.score(requests, quiet), strict=True):
        assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert mine.likeliest == wanted.likeliest


def test_a_sequence_that_is_too_long_loses_its_beginning(served, books_tokenizer: Tokenizer) -> None:
    ids = books_tokenizer.encode("It was a dark night, and the wind blew from the sea. " * 20)
    end = books_tokenizer.encode(" nobody came")
    kept = ids[-(served.max_length + 1 - len(end)) :]
    long, short = served.score([Request(ids, end), Request(kept, end)], quiet)
    assert long == short
    with pytest.raises(UsageError, match="an answer has 128 tokens, and the model reads 127"):
        served.score([Request([1], ids[:128])], quiet)


def test_texts_are_those_of_plain_torch_and_end_when_told(served, plain, books_tokenizer: Tokenizer) -> None:
    prompts = [books_tokenizer.encode(text) for text in ("The ship", "He said", "In the morning they", "A letter")]
    stop = books_tokenizer.encode(".")[-1]

    def finished(tokens: list[int]) -> bool:
        return tokens[-1] == stop

    mine = served.write(prompts, 24, finished)
    assert mine == plain.write(prompts, 24, finished)
    assert {row[-1] == stop or len(row) == 24 for row in mine} == {True}
    assert served.write(prompts, 24, finished) == mine, "the engine is free again"


class _Broken:
    """An engine whose logits are not numbers."""

    def __init__(self, engine, event: TokenEvent):
        self.info, self.has_work, self._event = engine.info, True, event

    def add(self, request) -> None:
        pass

    def step(self) -> list[TokenEvent]:
        return [self._event]


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent("0", finish_reason="error", error="the logits are not numbers"),
        TokenEvent("0", finish_reason="length", prompt_logprobs=(None, TokenLogprobs(math.nan, 1, ((3, math.nan),)))),
    ],
    ids=["refused", "nan"],
)
def test_logits_that_are_not_numbers_end_it(served, event: TokenEvent) -> None:
    broken = ServedAnswers(_Broken(served._engine, event))
    with pytest.raises(NumericsError, match="logits"):
        broken.score([Request([1], [2])], quiet)
