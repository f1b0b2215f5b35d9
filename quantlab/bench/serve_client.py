"""One streamed request to an OpenAI-compatible server, timed as its user sees it.

Knows nothing about how many there are or why. Works with any server that streams server-sent events.
"""

import json
import os
from array import array
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp

from quantlab.bench.serve_options import Target
from quantlab.errors import printable

MAX_EVENT_BYTES = 8_000_000
MAX_ERROR_CHARS = 160
Body = Mapping[str, Any]


@dataclass(slots=True)
class Outcome:
    """What became of one request; times in seconds of `perf_counter`.

    `due` is when it should have been sent, which is what latencies count from: a client that falls behind must not
    make the server look better. `gaps` are the times between pieces of text, `pieces` of them; `output_tokens` is the
    server's own count where it gives one.
    """

    due: float
    sent: float = 0.0
    first: float | None = None
    last: float = 0.0
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    pieces: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    failure: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first text."""
        return None if self.first is None else self.first - self.due

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.last - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first, on average; None with fewer than two tokens."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)


class StreamError(Exception):
    """The stream said that something went wrong, or broke its own rules."""


def new_session(target: Target) -> aiohttp.ClientSession:
    """A session without a limit on connections; the loads set that."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limit = aiohttp.ClientTimeout(total=target.timeout, sock_connect=30)
    return aiohttp.ClientSession(headers=headers, timeout=limit, connector=aiohttp.TCPConnector(limit=0))


async def ask(session: aiohttp.ClientSession, target: Target, body: Body, due: float) -> Outcome:
    """Send one request and read its stream to the end; whatever goes wrong is named in the outcome, never raised."""
    outcome = Outcome(due, sent=perf_counter())
    route = "chat/completions" if target.api == "chat" else "completions"
    try:
        async with session.post(target.url(route), json=body) as response:
            if response.status != 200:
                outcome.failure = f"HTTP {response.status}: {_reason(await response.read())}"
            elif response.content_type != "text/event-stream":
                outcome.failure = f"not a stream but {printable(response.content_type)[:60]}"
            else:
                await _follow(response, outcome)
    except TimeoutError:
        outcome.failure = "timed out"
    except StreamError as error:
        outcome.failure = f"stream: {error}"
    except (aiohttp.ClientError, OSError) as error:
        outcome.failure = _name(error)
    if not outcome.last:
        outcome.last = perf_counter()
    return outcome


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival, data) of each server-sent event; raises StreamError for one that is larger than MAX_EVENT_BYTES."""
    rest = b""
    async for chunk in response.content.iter_any():
        arrived = perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield arrived, line[5:].strip()
        if len(rest) > MAX_EVENT_BYTES:
            raise StreamError("an event without an end")


async def _follow(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    done = False
    async for arrived, data in events(response):
        if data == b"[DONE]":
            done = True
            break
        event = _parsed(data)
        try:
            _note(event, arrived, outcome)
        except (AttributeError, TypeError, ValueError):
            raise StreamError("an event of another shape") from None
    outcome.last = outcome.last or perf_counter()
    if not outcome.counted:
        outcome.output_tokens = outcome.pieces
    if not done:
        raise StreamError("ended without [DONE]")
    if outcome.first is None:
        raise StreamError("had no text")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise StreamError("an event that is no JSON") from None
    if not isinstance(event, dict):
        raise StreamError("an event that is no object")
    if event.get("error"):
        raise StreamError(_reason(data))
    return event


def _note(event: dict[str, Any], arrived: float, outcome: Outcome) -> None:
    """Take an event's text and counts into the outcome."""
    usage = event.get("usage")
    if usage:
        outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        outcome.output_tokens = int(usage.get("completion_tokens") or 0)
        outcome.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        outcome.counted = True
    if not any(_has_text(choice) for choice in event.get("choices") or ()):
        return
    if outcome.first is None:
        outcome.first = arrived
    else:
        outcome.gaps.append(arrived - outcome.last)
    outcome.last = arrived
    outcome.pieces += 1


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether the event shows its reader something: a chat's first one often names the role alone."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning_content"))


def _reason(content: bytes) -> str:
    """What an error's body says, in its own words where it has OpenAI's shape."""
    text = content[:4096].decode("utf-8", "replace")
    try:
        error = json.loads(content).get("error", {})
        text = str(error.get("message") if isinstance(error, dict) else error) or text
    except (ValueError, AttributeError):
        pass
    return printable(text)[:MAX_ERROR_CHARS]


def _name(error: BaseException) -> str:
    """A failure's kind without addresses and ports, so that the same failures are counted together."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        return f"cannot connect: {os.strerror(number) if number else type(error.os_error).__name__}"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | ConnectionError):
        return "connection lost"
    return type(error).__name__
