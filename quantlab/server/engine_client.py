"""The front process's side of the engine process: requests out, streams of events back, and its death noticed.

One connection, read by one task. Knows nothing about HTTP or text.
"""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantlab.errors import EngineDied, QuantlabError
from quantlab.log import logger
from quantlab.runtime.options import EngineInfo, EngineOptions, EngineStats
from quantlab.runtime.request import Request, TokenEvent
from quantlab.server.messages import (
    LENGTH,
    REPORTS,
    Abort,
    Add,
    Command,
    Failed,
    Ready,
    Report,
    Start,
    Step,
    Stop,
    frame,
    frame_length,
    raised,
)

LOG = logger(__name__)
ENGINE_COMMAND: Final = (sys.executable, "-m", "quantlab.server.engine_process")
STOP_SECONDS: Final = 5.0
READ_LIMIT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A process that was started, and our end of the connection to it."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


class TokenStream:
    """The events of the requests of one caller, in the order in which they came."""

    def __init__(self) -> None:
        self._events: deque[TokenEvent] = deque()
        self._error: QuantlabError | None = None
        self._arrived = asyncio.Event()

    def push(self, event: TokenEvent) -> None:
        """Add an event."""
        self._events.append(event)
        self._arrived.set()

    def fail(self, error: QuantlabError) -> None:
        """Let the reader have `error` after the events that are there."""
        self._error = error
        self._arrived.set()

    async def next(self) -> list[TokenEvent]:
        """All events that are there, at least one: a reader that is late catches up in one go.

        Raises the engine's error when there is none left and none will come.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        events = list(self._events)
        self._events.clear()
        return events


class EngineClient:
    """One engine process; use `launch`, then `ready`, then `stream`; `death` is set when it is gone."""

    def __init__(self, process: EngineProcess):
        self.process = process.process
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.death: asyncio.Future[QuantlabError] = asyncio.get_running_loop().create_future()
        self._connection = process.connection
        self._heard = time.monotonic()
        self._streams: dict[str, TokenStream] = {}
        self._built: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def ready(self) -> EngineInfo:
        """Wait until the engine is built; returns what was built, raises what went wrong."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection, limit=READ_LIMIT)
        self._reading = asyncio.create_task(self._read(reader))
        return await self._built

    @property
    def alive(self) -> bool:
        """Whether requests can be sent."""
        return self.info is not None and not self.death.done()

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._streams)

    @asynccontextmanager
    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[TokenStream]:
        """Begin `requests` together; on the way out of the block, those that have not ended are aborted.

        Raises EngineDied when there is no engine.
        """
        if not self.alive:
            raise self.death.result() if self.death.done() else EngineDied("the engine is not ready")
        if not self._streams:
            self._heard = time.monotonic()
        stream = TokenStream()
        for request in requests:
            self._streams[request.request_id] = stream
            self._send(Add(request))
        try:
            yield stream
        finally:
            self.abort(request.request_id for request in requests)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget those of `request_ids` that have not ended."""
        for request_id in request_ids:
            if self._streams.pop(request_id, None) is not None:
                self._send(Abort(request_id))

    def fail_all(self, error: QuantlabError) -> None:
        """End every request that is under way with `error`."""
        for stream in self._streams.values():
            stream.fail(error)
        self.abort(list(self._streams))

    async def died(self) -> QuantlabError:
        """Wait for the engine's end; returns why."""
        return await asyncio.shield(self.death)

    def hangs(self, seconds: float) -> bool:
        """Whether the engine has work and has said nothing for so long."""
        return bool(self._streams) and self.alive and time.monotonic() - self._heard > seconds

    async def stop(self) -> None:
        """End the process, by force if it does not end by itself or has not begun to listen."""
        self._send(Stop())
        if self.info is None and not self.death.done():
            self.process.kill()
        try:
            await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        if self._reading is not None:
            await self._reading
        self._connection.close()

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self.death.done():
            self._writer.write(frame(command))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hand out reports until the stream ends; then everyone who waits is told why."""
        error: QuantlabError | None = None
        try:
            while error is None:
                length = frame_length(await reader.readexactly(LENGTH.size))
                error = self._take(REPORTS.decode(await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, OSError):
            error = EngineDied(f"the engine process {await self._ending()}")
        except ValueError as wrong:
            error = EngineDied(f"the engine process sent what is no message: {wrong}")
        self._die(error)

    def _take(self, report: Report) -> QuantlabError | None:
        """Deal with one report; returns the error that ends the engine."""
        self._heard = time.monotonic()
        if isinstance(report, Step):
            self.stats = report.stats
            for event in report.events:
                self._deliver(event)
        elif isinstance(report, Ready):
            self.info = report.info
            if not self._built.done():  # who waited for it may have been told to stop
                self._built.set_result(report.info)
        else:
            return self._failed(report)
        return None

    def _failed(self, report: Failed) -> QuantlabError:
        """While building, the error itself; later, that the engine died of it."""
        error = raised(report)
        return error if not self._built.done() else EngineDied(f"the engine failed: {error.message}", fix=error.fix)

    def _deliver(self, event: TokenEvent) -> None:
        """Events of requests that were aborted meanwhile are dropped."""
        stream = self._streams.get(event.request_id)
        if stream is not None:
            if event.finish_reason is not None:
                del self._streams[event.request_id]
            stream.push(event)

    def _die(self, error: QuantlabError) -> None:
        if not self._built.done():
            self._built.set_exception(error)
        if not self.death.done():
            self.death.set_result(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
        if self._writer is not None:
            self._writer.close()

    async def _ending(self) -> str:
        """How the process ended."""
        try:
            code = await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "closed its connection"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def launch(folder: Path, options: EngineOptions, command: Sequence[str] = ENGINE_COMMAND) -> EngineProcess:
    """Start an engine process, which builds its engine as soon as it can. What it prints goes to our stderr.

    Its process group is its own: Ctrl-C, which a terminal sends to a whole group, would break into its imports.
    """
    start = frame(Start(str(folder), options))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
            process_group=0,
        )  # fmt: skip
        ours.sendall(start)
    ours.setblocking(False)
    return EngineProcess(process, ours)
