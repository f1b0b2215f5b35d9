"""Tokens to text while they come: whole characters only, and nothing that may turn out to belong to a stop string.

What has been given out is never taken back, and all of it together is what the tokenizer makes of all the tokens.
Knows nothing about engines, requests or how text is sent.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantlab.text import Tokenizer
from quantlab.token_bytes import TokenBytes

CONTEXT_TOKENS = 8  # of the prompt, for what a first token continues: a character of 4 bytes, a space or none
INCOMPLETE_TOKENS = 8  # a character has at most 4 bytes, so text that ends in U+FFFD for longer does not wait for one


class Detokenizer(Protocol):
    """Text of one output."""

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""

    def finish(self) -> str:
        """What was held back, U+FFFD for a character that never became whole."""


class ByteDetokenizer:
    """For tokenizers whose tokens are bytes: a token costs a look-up."""

    def __init__(self, vocabulary: TokenBytes, prompt_ids: Sequence[int] = (), skip_special: bool = True):
        assert vocabulary.joined
        self._table = vocabulary.table
        self._skipped = vocabulary.special if skip_special else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces = 0 if len(prompt_ids) else vocabulary.leading_spaces
        for token_id in prompt_ids[-CONTEXT_TOKENS:]:  # a prompt may end inside a character
            self._decoder.decode(self._bytes(token_id))

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        return self._strip(self._decoder.decode(self._bytes(token_id)))

    def finish(self) -> str:
        """What was held back, U+FFFD for a character that never became whole."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _bytes(self, token_id: int) -> bytes:
        known = 0 <= token_id < len(self._table) and token_id not in self._skipped
        return self._table[token_id] if known else b""

    def _strip(self, text: str) -> str:
        while self._spaces and text:
            if text[0] != " ":
                self._spaces = 0
                break
            text, self._spaces = text[1:], self._spaces - 1
        return text


class WindowDetokenizer:
    """For any other tokenizer: decodes the last tokens again and gives out what is new, once it ends whole."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special: bool = True):
        self._backend = tokenizer.backend
        self._skip_special = skip_special
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._read = len(self._ids)

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token_id)
        text = self._new()
        if text.endswith("\ufffd") and len(self._ids) - self._read < INCOMPLETE_TOKENS:
            return ""
        if text:  # tokens without text are no context
            self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back, U+FFFD for a character that never became whole."""
        text = self._new()
        self._read = len(self._ids)
        return text

    def _new(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :]

    def _decode(self, ids: list[int]) -> str:
        skip = self._skip_special
        return str(self._backend.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def detokenizer(
    tokenizer: Tokenizer, vocabulary: TokenBytes, prompt_ids: Sequence[int] = (), skip_special: bool = True
) -> Detokenizer:
    """A detokenizer for the output that follows `prompt_ids`; `skip_special` leaves special tokens out of the text."""
    if vocabulary.joined:
        return ByteDetokenizer(vocabulary, prompt_ids, skip_special)
    return WindowDetokenizer(tokenizer, prompt_ids, skip_special)


class StopStrings:
    """Looks for the stop string that is complete first, wherever the borders of the pieces of text are."""

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stop for stop in stops if stop)
        self.held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """The text that may be given out, and the stop string if there is one: the text ends just before it."""
        self.held += text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            text, self.held = self.held[:at], ""
            return text, stop
        return self._let_go(self._possible()), None

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return self._let_go(0)

    def _possible(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        lengths = range(min(longest, len(self.held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self.held[-n:]) for stop in self.stops)), 0)

    def _let_go(self, kept: int) -> str:
        cut = len(self.held) - kept
        text, self.held = self.held[:cut], self.held[cut:]
        return text


@dataclass(frozen=True, slots=True)
class Delta:
    """New text; how many of the tokens given belong to the output; the stop string that ended it.

    `offsets`: for each of those tokens the characters of output decoded before it (text_offset in OpenAI's API,
    counted from the end of the prompt); characters of a stop string and those held back count.
    """

    text: str
    tokens: int
    offsets: tuple[int, ...]
    stop: str | None = None


class TextStream:
    """The text of one output: detokenizer and stop strings together.

    Stop strings are looked for in the text from the `min_tokens`-th token on.
    """

    def __init__(self, source: Detokenizer, stops: Iterable[str] = (), min_tokens: int = 0):
        self._source = source
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._decoded = 0

    @property
    def decoded(self) -> int:
        """Characters decoded so far, those of stop strings and those held back included."""
        return self._decoded

    def add(self, token_ids: Iterable[int]) -> Delta:
        """Go on by `token_ids`; those after a stop string are left out."""
        texts: list[str] = []
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._decoded)
            self._tokens += 1
            text, stop = self._match(self._source.add(token_id))
            texts.append(text)
            if stop is not None:
                return Delta("".join(texts), len(offsets), tuple(offsets), stop)
        return Delta("".join(texts), len(offsets), tuple(offsets))

    def finish(self) -> Delta:
        """The rest of the text, when no more tokens come; a character that became no whole one can complete a stop."""
        text, stop = self._match(self._source.finish())
        return Delta(text if stop else text + self._stops.finish(), 0, (), stop)

    def _match(self, text: str) -> tuple[str, str | None]:
        self._decoded += len(text)
        if self._tokens < self._min_tokens:
            return text, None
        return self._stops.add(text)
