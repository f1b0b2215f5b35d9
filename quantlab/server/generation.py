"""One HTTP request's sequences, from the queue to pieces of text, counted and timed on the way.

Both ways of asking, streamed or not, read the same pieces. Knows nothing about the shape of answers.
"""

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from quantlab.errors import QuantlabError, printable
from quantlab.log import logger
from quantlab.runtime.options import EngineInfo
from quantlab.runtime.request import Request, SamplingParams, TokenEvent
from quantlab.server.admission import QueueFull, Ticket
from quantlab.server.choice import Choice, Piece, Prompt
from quantlab.server.engine_client import EngineClient
from quantlab.server.errors import ApiError
from quantlab.server.protocol import MAX_CHOICES, SamplingBody
from quantlab.server.responses import CachedTokens, Usage
from quantlab.server.sampling import for_choice, for_prompt, priority_of, stop_strings
from quantlab.server.service import Service

LOG = logger(__name__)
LOGGED_CHARS = 2000


class Generation:
    """The choices of one HTTP request under way; `id` is the answer's."""

    def __init__(self, service: Service, answer_id: str, engine: EngineClient, ticket: Ticket, arrived: float):
        self.id = answer_id
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self._service = service
        self._engine = engine
        self._ticket = ticket
        self._arrived = arrived
        self._requests: list[Request] = []

    def add(self, choice: Choice, request: Request) -> None:
        """Have `request` answered as the next choice."""
        self.choices.append(choice)
        self._requests.append(request)
        self._service.metrics.prompt_tokens.observe(len(request.prompt_ids))

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What the choices gain, until all have ended; leaving early ends what is under way.

        Raises ApiError when the engine fails a sequence, or itself.
        """
        by_id = dict(zip((request.request_id for request in self._requests), self.choices, strict=True))
        try:
            async with self._engine.stream(self._requests) as stream:
                while not all(choice.done for choice in self.choices):
                    pieces = self._take(await stream.next(), by_id)
                    self._engine.abort(
                        self._requests[piece.choice.index].request_id for piece in pieces if piece.choice.stopped_early
                    )
                    if pieces:
                        yield pieces
        except QuantlabError as error:
            raise self._service.told(error) from error
        finally:
            for choice in self.choices:
                if not choice.done:
                    self._service.metrics.ended("abort")

    def usage(self) -> Usage:
        """The counts so far; choices of one prompt share it."""
        firsts = {choice.prompt.index: choice for choice in reversed(self.choices)}.values()
        prompt = sum(len(choice.prompt.ids) for choice in firsts)
        completion = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in firsts)
        return Usage(prompt, completion, prompt + completion, CachedTokens(cached))

    def _take(self, events: Sequence[TokenEvent], by_id: dict[str, Choice]) -> list[Piece]:
        """Give each choice its events; returns a piece for each that has something to say."""
        now = time.monotonic()
        touched: dict[int, Choice] = {}
        for event in events:
            choice = by_id[event.request_id]
            if event.finish_reason in ("error", "abort"):
                choice.done = True
                self._service.metrics.ended("error")
                raise ApiError(500, event.error or "the engine gave this request up", code="engine_error")
            if not choice.done:
                self._time(choice, event, now)
                choice.feed(event)
                touched[choice.index] = choice
        for choice in touched.values():
            if choice.done:
                self._finish(choice)
        return [piece for choice in touched.values() if (piece := choice.take()) is not None]

    def _time(self, choice: Choice, event: TokenEvent, now: float) -> None:
        metrics = self._service.metrics
        if choice.first_at is None:
            choice.first_at = now
            metrics.first_token.observe(now - self._arrived)
            metrics.queue.observe(event.queue_seconds)
            metrics.prefill.observe(max(0.0, now - self._arrived - event.queue_seconds))
            metrics.cached_tokens.inc(event.cached_tokens)
            self._service.admission.start(self._ticket)
        elif event.token_ids:
            metrics.inter_token.observe(now - choice.last_at)
        choice.last_at = now

    def _finish(self, choice: Choice) -> None:
        metrics = self._service.metrics
        assert choice.first_at is not None and choice.finish_reason is not None
        seconds = choice.last_at - choice.first_at
        metrics.ended(choice.finish_reason)
        metrics.end_to_end.observe(choice.last_at - self._arrived)
        metrics.decode.observe(seconds)
        metrics.generation_tokens.observe(choice.tokens)
        if choice.tokens > 1:
            metrics.per_token.observe(seconds / (choice.tokens - 1))
        LOG.info(
            "%s/%d: %d prompt tokens (%d cached), %d tokens, %s, %.3f s to the first, %.3f s",
            self.id,
            choice.index,
            len(choice.prompt.ids),
            choice.cached_tokens,
            choice.tokens,
            choice.finish_reason,
            choice.first_at - self._arrived,
            choice.last_at - self._arrived,
        )


class Asked:
    """What one HTTP request asks for, once its body is read: `params` still without the prompts' lengths."""

    def __init__(self, body: SamplingBody, kind: str, params: SamplingParams, default_tokens: int | None):
        self.body = body
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.params = params
        self.default_tokens = default_tokens
        self.arrived = time.monotonic()


@asynccontextmanager
async def begun(
    service: Service, asked: Asked, count: int, read: Callable[[EngineInfo], Awaitable[list[Prompt]]]
) -> AsyncIterator[Generation]:
    """The generation that answers `count` prompts, its place in the queue held until the end of the block.

    `read` gives the prompts, with the place held already: that is work too. Raises ApiError for what is too much.
    """
    engine, info = service.working()
    n = asked.body.n or 1
    if count * n > MAX_CHOICES:
        message = f"{count} prompts times n {n} are more than {MAX_CHOICES} answers"
        raise ApiError(400, message, code="invalid_value", param="n")
    try:
        with service.admission.enter(count * n) as ticket:
            service.metrics.choices.observe(n)
            if asked.params.grammar is not None:
                await service.strangers.check(asked.params.grammar)
            generation = Generation(service, asked.id, engine, ticket, asked.arrived)
            prompts = await read(info)
            service.admission.count(ticket, n * sum(len(prompt.ids) for prompt in prompts))
            for prompt in prompts:
                _add_choices(generation, service, asked, prompt, info)
            yield generation
    except QueueFull as full:
        service.metrics.refused(full.reason)
        raise ApiError(429, str(full), code=full.reason, retry_after=full.retry_after) from full


def _add_choices(generation: Generation, service: Service, asked: Asked, prompt: Prompt, info: EngineInfo) -> None:
    """The n choices of one prompt."""
    body = asked.body
    params = for_prompt(asked.params, len(prompt.ids), asked.default_tokens, info)
    skip_special = body.skip_special_tokens is not False
    if service.options.log_requests:
        LOG.info("%s: %s", asked.id, printable(prompt.text[:LOGGED_CHARS]))
    for number in range(body.n or 1):
        index = len(generation.choices)
        stream = service.texts.stream(prompt.ids, stop_strings(body), params.min_tokens, skip_special)
        choice = Choice(index, prompt, stream, bool(body.include_stop_str_in_output))
        request = Request(
            f"{asked.id}-{index}",
            prompt.ids,
            for_choice(params, number),
            priority_of(body, service.options.engine),
            body.cache_salt or "",
        )
        generation.add(choice, request)
