"""The choices of /v1/completions: OpenAI's legacy log probabilities, and the prompt where it is echoed.

Knows nothing about requests under way.
"""

from collections.abc import Sequence

from quantlab.runtime.request import TokenLogprobs
from quantlab.server.choice import Choice, Piece
from quantlab.server.protocol import CompletionBody
from quantlab.server.responses import CompletionChoice, CompletionLogprobs
from quantlab.server.texts import Texts

IMPOSSIBLE = -9999.0  # JSON has no -inf; clients of this API know this number


class CompletionWriter:
    """Makes the choices of answers from pieces; the first piece of a choice has its echo."""

    def __init__(self, texts: Texts, body: CompletionBody):
        self._texts = texts
        self._echo = bool(body.echo)
        self._logprobs = body.logprobs is not None
        self._skip_special = body.skip_special_tokens is not False
        self._begun: set[int] = set()

    def write(self, piece: Piece) -> CompletionChoice:
        """The choice that says `piece`."""
        choice = piece.choice
        text = piece.text
        logprobs = self._output_logprobs(piece) if self._logprobs else None
        if self._echo and choice.index not in self._begun:
            self._begun.add(choice.index)
            text = choice.prompt.text + text
            logprobs = extended(self._echo_logprobs(choice), logprobs) if logprobs is not None else None
        return CompletionChoice(choice.index, text, logprobs, piece.finish_reason, piece.stop_reason)

    def _output_logprobs(self, piece: Piece) -> CompletionLogprobs:
        base = len(piece.choice.prompt.text) if self._echo else 0
        tokens = piece.tokens
        ids = [token.token_id for token in tokens]
        return self._list(ids, [token.logprobs for token in tokens], [base + token.offset for token in tokens])

    def _echo_logprobs(self, choice: Choice) -> CompletionLogprobs:
        ids = choice.prompt.ids
        known = choice.prompt_logprobs or (None,) * len(ids)
        return self._list(ids, known, list(self._texts.offsets(ids, self._skip_special)))

    def _list(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], offsets: list[int]
    ) -> CompletionLogprobs:
        names = [token_name(self._texts, token) for token in ids]
        values = [None if known is None else finite(known.logprob) for known in logprobs]
        tops = [None if known is None else self._top(name, known) for name, known in zip(names, logprobs, strict=True)]
        return CompletionLogprobs(names, values, tops, offsets)

    def _top(self, name: str, known: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that came."""
        top = {token_name(self._texts, token): finite(value) for token, value in known.top}
        return {**top, name: finite(known.logprob)}


def token_name(texts: Texts, token_id: int) -> str:
    """A token as a key: its text, or its bytes spelled out where they are no whole characters."""
    data = texts.vocabulary.of(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(value: float) -> float:
    """A log probability that JSON can say."""
    return max(value, IMPOSSIBLE)


def extended(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The tokens of both, in order."""
    return CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        (first.top_logprobs or []) + (second.top_logprobs or []),
        first.text_offset + second.text_offset,
    )


def joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """The pieces of a choice as one."""
    known = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = CompletionLogprobs(
        [token for part in known for token in part.tokens],
        [value for part in known for value in part.token_logprobs],
        [top for part in known for top in part.top_logprobs or []],
        [offset for part in known for offset in part.text_offset],
    )
    text = "".join(part.text for part in parts)
    last = parts[-1]
    return CompletionChoice(last.index, text, logprobs if known else None, last.finish_reason, last.stop_reason)
