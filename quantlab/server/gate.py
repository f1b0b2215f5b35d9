"""What every HTTP request passes before a route: an id, a name, a key, a body of bounded size that is JSON.

Plain ASGI around the application, so that nothing behind it sees a request that may not come in. Knows nothing about
what the routes do.
"""

import asyncio
import uuid
from collections.abc import Container
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantlab.log import logger
from quantlab.server.auth import Keys
from quantlab.server.errors import ApiError, unexpected
from quantlab.server.hosts import Hosts
from quantlab.server.metrics import Metrics
from quantlab.server.page_files import ROUTES

LOG = logger(__name__)
OPEN: Final = ("/health", "/ready")
MAX_BODY: Final = 8 << 20
BODY_SECONDS: Final = 60.0
MAX_ID: Final = 128
NOSNIFF: Final = (b"x-content-type-options", b"nosniff")


class Gate:
    """The application behind its checks; `reading` are the paths that take a body. Counts every answer."""

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Hosts, metrics: Metrics, reading: Container[str]):
        self._hosts = hosts
        self._reading = reading
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        answer = _Answer(send, _request_id(headers.get(b"x-request-id")))
        try:
            self._hosts.check(headers.get(b"host"))
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] in self._reading:
                receive = _replay(await _read_body(headers, receive), receive)
            await self._app(scope, receive, answer.send)
        except ApiError as error:
            await error.response()(scope, receive, answer.send)
        except Exception:
            LOG.exception("a request failed: %s %s", scope["method"], scope["path"])
            if not answer.begun:
                await unexpected().response()(scope, receive, answer.send)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(route, answer.status)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys.required or path in OPEN or self._keys.opens(headers.get(b"authorization")):
            return
        error = ApiError(401, "this server wants an API key: Authorization: Bearer KEY", code="invalid_api_key")
        # A browser that opens the page asks its user, and sends the key with whatever the page asks for later.
        error.headers["www-authenticate"] = 'Basic realm="quantlab"' if path in ROUTES else "Bearer"
        raise error


class _Answer:
    """What is sent: the request's id is added, the status remembered."""

    def __init__(self, send: Send, request_id: bytes):
        self._send = send
        self._request_id = request_id
        self.begun = False
        self.status = 499  # the client left first

    async def send(self, message: Message) -> None:
        """ASGI: pass a message on."""
        if message["type"] == "http.response.start":
            self.begun = True
            self.status = message["status"]
            message["headers"] = [*message["headers"], (b"x-request-id", self._request_id), NOSNIFF]
        await self._send(message)


def _request_id(given: bytes | None) -> bytes:
    """The client's own id where it is harmless, else a new one."""
    if given and len(given) <= MAX_ID and given.isascii() and given.decode().isprintable():
        return given
    return uuid.uuid4().hex.encode()


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    """The whole body; raises ApiError for one that is too large, too slow, or not JSON by its type."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(415, "the content type must be application/json", code="unsupported_media_type")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length[:12]) > MAX_BODY:
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left", code="client_closed")
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise _too_large()
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS:.0f} seconds", code="timeout") from error


def _too_large() -> ApiError:
    error = ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="request_too_large")
    error.headers["connection"] = "close"
    return error


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive`, beginning with `body` once more."""
    pending = [body]

    async def replay() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
