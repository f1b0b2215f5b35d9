"""A model in this process: prompts in, texts out, many at once.

    from quantlab import LLM, SamplingParams
    llm = LLM("./Llama-3.2-1B-w4a16")
    print(llm.generate(["It was a dark and"], SamplingParams(max_tokens=64))[0].text)

Knows nothing about servers, and of models only what the engine says. One thread uses it.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from quantlab.chat_template import ChatTemplate, template_of
from quantlab.detokenizer import TextStream, detokenizer
from quantlab.errors import CheckpointError, UsageError
from quantlab.runtime.build import build_engine
from quantlab.runtime.engine import Engine
from quantlab.runtime.grammar import TokenGrammars
from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.runtime.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from quantlab.text import Tokenizer, load_tokenizer
from quantlab.token_bytes import TokenBytes, token_bytes

Prompt = str | Sequence[int]  # text, which the tokenizer frames, or token ids as they are
OPTIONS, PARAMS = EngineOptions(), SamplingParams()


@dataclass(frozen=True, slots=True)
class Completion:
    """What continues one prompt.

    `stop` is the stop string or token that ended it; neither is part of `text`. `logprobs` is parallel to `token_ids`,
    `prompt_logprobs` to `prompt_ids`, where asked for. `error` says why a request ended with "error".
    """

    prompt_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of prompt number `index`; its last piece has all of it as `completion`."""

    index: int
    text: str
    completion: Completion | None = None


class LLM:
    """The model in a folder, 16-bit or packed, ready for prompts."""

    def __init__(self, folder: str | Path, options: EngineOptions = OPTIONS) -> None:
        """Load it; raises CheckpointError, UnsupportedModel or UsageError, each with what to do."""
        self.tokenizer: Tokenizer = load_tokenizer(Path(folder))
        self._vocabulary: TokenBytes = token_bytes(self.tokenizer)
        self._engine: Engine = build_engine(Path(folder), options)
        self._grammars = TokenGrammars(Path(folder), self.info.vocab_size, self.info.eos_token_ids)
        self._writings: dict[str, _Writing] = {}
        self._numbers = count()

    @property
    def info(self) -> EngineInfo:
        """What was built."""
        return self._engine.info

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = PARAMS,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """What continues each of `prompts`, in their order, all of them worked on together.

        `params` are for all or one for each. Raises UsageError before any is begun when one cannot be run, GrammarError
        for a grammar that cannot be compiled.
        """
        ended = {piece.index: piece.completion for piece in self.stream(prompts, params, stop) if piece.completion}
        return [ended[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = PARAMS,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """As `generate`, piece by piece as they come; requests of a stream that is closed early are given up."""
        names = self._begin(prompts, params, stop)
        mine = [self._writings[name] for name in names]
        try:
            while any(writing.pieces or writing.completion is None for writing in mine):
                if not any(writing.pieces for writing in mine):
                    self._step()
                for writing in mine:
                    while writing.pieces:
                        yield writing.pieces.popleft()
        finally:
            for name in names:
                self._writings.pop(name, None)
                self._engine.abort(name)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt that asks for the next message after `messages` (role, content), by the model's own template.

        Raises CheckpointError when the folder has none, UsageError when it refuses the messages.
        """
        template = template_of(self.tokenizer)
        if template is None:
            fix = "a plain prompt, or a model that was made for chat"
            raise CheckpointError("the tokenizer has no chat template", where=str(self.tokenizer.folder), fix=fix)
        return tuple(self.tokenizer.encode(ChatTemplate(template).render(messages)))

    def _begin(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams], stop: Sequence[str]
    ) -> list[str]:
        """Hand all prompts to the engine, or none."""
        if isinstance(prompts, str):
            raise UsageError("prompts is one text", where="generate", fix="a list: [text]")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but {len(each)} params", where="generate", fix="one for each")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise UsageError("a stop string is empty", where="generate", fix="leave it out")
        names: list[str] = []
        try:
            for index, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
                name = f"prompt {next(self._numbers)}"
                if settings.grammar is not None:
                    self._grammars.check(settings.grammar)
                request = Request(name, self._ids(prompt), settings)
                self._engine.add(request)
                names.append(name)
                source = detokenizer(self.tokenizer, self._vocabulary, request.prompt_ids)
                self._writings[name] = _Writing(index, request, TextStream(source, stops, settings.min_tokens))
        except BaseException:
            for name in names:
                self._engine.abort(name)
                del self._writings[name]
            raise
        return names

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt, special_tokens=True) if isinstance(prompt, str) else prompt)

    def _step(self) -> None:
        """One step of the engine, whoever's requests it works on."""
        for event in self._engine.step():
            writing = self._writings.get(event.request_id)
            if writing is not None and writing.completion is None:
                writing.take(event)
                if writing.completion is not None and event.finish_reason is None:
                    self._engine.abort(event.request_id)


class _Writing:
    """One prompt's text as it grows."""

    def __init__(self, index: int, request: Request, stream: TextStream) -> None:
        self.pieces: deque[Piece] = deque()
        self.completion: Completion | None = None
        self._index = index
        self._request = request
        self._stream = stream
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._first: TokenEvent | None = None

    def take(self, event: TokenEvent) -> None:
        """Go on by what a step gave; a stop string ends the text here."""
        self._first = self._first or event
        shown = event.token_ids if event.stop_token is None else event.token_ids[:-1]
        delta = self._stream.add(shown)
        kept = delta.tokens if delta.stop else len(event.token_ids)
        self._ids += event.token_ids[:kept]
        self._logprobs += (event.logprobs or ())[:kept]
        text, stop = delta.text, delta.stop
        if stop is None and event.finish_reason is not None:
            rest = self._stream.finish()
            text, stop = text + rest.text, rest.stop
        self._texts.append(text)
        if stop is not None or event.finish_reason is not None:
            reason: FinishReason = "stop" if stop is not None else event.finish_reason or "stop"
            self.completion = self._complete(reason, event.stop_token if stop is None else stop, event.error)
        if text or self.completion is not None:
            self.pieces.append(Piece(self._index, text, self.completion))

    def _complete(self, reason: FinishReason, stop: str | int | None, error: str | None) -> Completion:
        assert self._first is not None
        return Completion(
            self._request.prompt_ids,
            "".join(self._texts),
            tuple(self._ids),
            reason,
            stop,
            None if self._request.params.logprobs is None else tuple(self._logprobs),
            self._first.prompt_logprobs,
            self._first.cached_tokens,
            error,
        )
