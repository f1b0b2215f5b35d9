"""Answers that are made while the client waits: a client that leaves ends the making at once, streamed or not.

Nothing is sent before there is something to send, so that what goes wrong until then has its own status. Knows nothing
about what the answers are.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantlab.log import logger
from quantlab.server.errors import ApiError, unexpected

LOG = logger(__name__)
DONE: Final = b"data: [DONE]\n\n"
SEND_SECONDS: Final = 60.0  # a client that reads nothing for so long has left
HEADERS: Final = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Answer(Response):
    """One body, sent when `parts` gives it."""

    media_type = "application/json"
    streams = False

    def __init__(self, parts: AsyncGenerator[bytes, None]):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: make and send the answer, until it is done or the client has left."""
        making = asyncio.create_task(self._make(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not making.done():
                making.cancel()
            await asyncio.wait((making, leaving))
        if not making.cancelled():
            try:
                making.result()
            except TimeoutError:
                LOG.warning("a client has read nothing for %g s and is left", SEND_SECONDS)

    async def _make(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            try:
                first = await anext(parts)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_part(send, first)
            async for part in self._rest(parts):
                await _send_part(send, part)
        await send({"type": "http.response.body", "body": b""})

    async def _rest(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The parts after the first."""
        async for part in parts:
            yield part


class EventStream(Answer):
    """Server-sent events, as they come. An error is the last event; [DONE] ends whole answers alone."""

    media_type = "text/event-stream"
    streams = True

    async def _rest(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for part in parts:
                yield part
        except ApiError as error:
            yield b"data: " + error.body() + b"\n\n"
        except Exception:
            LOG.exception("a stream failed")
            yield b"data: " + unexpected().body() + b"\n\n"
        else:
            yield DONE


def event(body: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def _send_part(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
