"""One sequence of an answer: its tokens become text as they come, until the engine or a stop string ends it.

Knows nothing about the shape of answers or how events travel.
"""

from dataclasses import dataclass

from quantlab.detokenizer import TextStream
from quantlab.runtime.request import TokenEvent, TokenLogprobs
from quantlab.server.responses import FinishReason


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the output with its log probabilities; `offset` characters of output come before it."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Piece:
    """What a choice gained since the last piece."""

    choice: "Choice"
    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as ids and as text; `index` is its place in the request."""

    index: int
    ids: tuple[int, ...]
    text: str


class Choice:
    """The state of one sequence; `index` is its place in the answer."""

    def __init__(self, index: int, prompt: Prompt, stream: TextStream, keep_stop: bool):
        self.index = index
        self.prompt = prompt
        self.tokens = 0
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.first_at: float | None = None
        self.last_at = 0.0
        self.done = False
        self.stopped_early = False
        self._stream = stream
        self._keep_stop = keep_stop
        self._piece = Piece(self, "", [], None, None)

    def feed(self, event: TokenEvent) -> None:
        """Go on by one event; what comes after the end is dropped."""
        if self.done:
            return
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self._add_tokens(event)
        if event.finish_reason is not None and not self.done:
            self._end("length" if event.finish_reason == "length" else "stop", event.stop_token)

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended, until the last piece is taken."""
        return self._piece.finish_reason

    def take(self) -> Piece | None:
        """What came since the last piece; None when it is nothing yet, or half a character."""
        piece = self._piece
        if not (piece.text or piece.tokens or piece.finish_reason is not None):
            return None
        self._piece = Piece(self, "", [], None, None)
        return piece

    def _add_tokens(self, event: TokenEvent) -> None:
        # The token that ends an output is none of its text, unless the client wants it there.
        hidden = int(event.stop_token is not None and not self._keep_stop)
        shown = event.token_ids[: len(event.token_ids) - hidden]
        delta = self._stream.add(shown)
        counted = len(event.token_ids) if delta.stop is None else delta.tokens
        self.tokens += counted
        self._piece.text += delta.text
        if event.logprobs is not None:
            offsets = (*delta.offsets, self._stream.decoded)
            kept = zip(event.token_ids[:counted], event.logprobs[:counted], offsets[:counted], strict=True)
            self._piece.tokens += [Token(*parts) for parts in kept]
        if delta.stop is not None:
            self._stop_at(delta.stop)

    def _stop_at(self, stop: str) -> None:
        """A stop string is complete: the engine does not know, and must be told."""
        self.stopped_early = True
        self._piece.text += stop if self._keep_stop else ""
        self._close("stop", stop)

    def _end(self, reason: FinishReason, stop_token: int | None) -> None:
        rest = self._stream.finish()
        self._piece.text += rest.text
        if rest.stop is not None:
            self._piece.text += rest.stop if self._keep_stop else ""
            self._close("stop", rest.stop)
        else:
            self._close(reason, stop_token)

    def _close(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.done = True
        self._piece.finish_reason = reason
        self._piece.stop_reason = stop_reason
