"""A server from its start to its exit code: engine, HTTP, signals, what happens when the engine dies.

SIGTERM or Ctrl-C: no new work, what is under way goes on for `drain_seconds`, exit 0. A second one: the end, at once.
Knows nothing about routes or engines' insides.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Final, TypeVar

import uvicorn

from quantlab.errors import EngineDied, QuantlabError
from quantlab.log import logger
from quantlab.runtime.options import EngineInfo
from quantlab.server.app import create_app
from quantlab.server.engine_client import EngineClient, EngineProcess
from quantlab.server.service import Service

LOG = logger(__name__)
Done = TypeVar("Done")
Announce = Callable[[EngineInfo], None]
LINGER_SECONDS: Final = 1.5  # after the engine's death: errors reach the clients, /health says 503
CLOSE_SECONDS: Final = 2
POLL_SECONDS: Final = 0.05
WATCH_SECONDS: Final = 5.0
MAX_RESTARTS, RESTART_WINDOW = 3, 600.0
HURRIED: Final = 130


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: it would end by the signal, not by an exit code."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the lifecycle."""
        yield


class Lifecycle:
    """One run of a server; `launch` starts an engine process, `announce` is told when the first one is ready.

    Belongs to the event loop that runs when it is made.
    """

    def __init__(self, service: Service, launch: Callable[[], EngineProcess], announce: Announce):
        self._service = service
        self._launch = launch
        self._announce = announce
        self._stopping = asyncio.Event()
        self._restarts: list[float] = []

    async def run(self, listener: socket.socket, engine: EngineProcess) -> None:
        """Serve on `listener` until `stop`, then return; raises what ended the server otherwise."""
        server = HttpServer(http_config(self._service))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        serving.add_done_callback(lambda _: self._stopping.set())  # without HTTP there is nothing left to do
        try:
            await self._supervise(engine)
        finally:
            server.should_exit = True
            await serving
            await self._service.strangers.close()
            if self._service.engine is not None:
                await self._service.engine.stop()

    def stop(self) -> None:
        """Begin to drain; called again: end the process at once, and the engine's ends when its connection closes."""
        if self._stopping.is_set():
            os._exit(HURRIED)
        self._stopping.set()

    async def _supervise(self, process: EngineProcess) -> None:
        """Keep an engine there until `stop`; raises the error of one that died and is not replaced."""
        service = self._service
        while True:
            engine = service.engine = EngineClient(process)
            info = await self._unless_stopped(engine.ready())
            if info is not None:
                service.admission.slots = info.max_num_seqs
                service.strangers.expect(info)
                service.phase = "ready"
                if not self._restarts:
                    self._announce(info)
                await self._unless_stopped(service.strangers.start())
                await self._unless_stopped(self._end_of(engine))
            if self._stopping.is_set():
                await self._drain(engine)
                return
            process = await self._after_death(engine.death.result())

    async def _end_of(self, engine: EngineClient) -> None:
        """Wait until `engine` is gone; one that hangs is made to go."""
        limit = self._service.options.hang_seconds
        while not engine.death.done():
            await asyncio.wait((engine.death,), timeout=min(WATCH_SECONDS, limit))
            if engine.hangs(limit):
                LOG.error("the engine has work and has said nothing for %g s: it is killed", limit)
                engine.process.kill()
                await engine.died()

    async def _unless_stopped(self, work: Coroutine[None, None, Done]) -> Done | None:
        """The result of `work`, or None when `stop` came first."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            stopping.cancel()

    async def _after_death(self, error: QuantlabError) -> EngineProcess:
        """Another engine where that is wanted and may help; raises `error` where it is not."""
        service = self._service
        LOG.error("%s", error.one_line())
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTART_WINDOW]
        if not service.options.restart_engine or len(self._restarts) >= MAX_RESTARTS:
            service.phase = "dead"
            await asyncio.sleep(LINGER_SECONDS)
            raise error
        self._restarts.append(now)
        service.phase = "restarting"
        if service.engine is not None:
            await service.engine.stop()
        service.metrics.restarts.inc()
        return self._launch()

    async def _drain(self, engine: EngineClient) -> None:
        """Let what is under way come to its end, for a while."""
        service = self._service
        service.phase = "draining"
        until = time.monotonic() + service.options.drain_seconds
        while service.admission.requests and time.monotonic() < until and engine.alive:
            await asyncio.sleep(POLL_SECONDS)
        engine.fail_all(EngineDied("the server is shutting down"))


def http_config(service: Service) -> uvicorn.Config:
    """How uvicorn is to run: nothing logged, no header believed that a proxy would set."""
    return uvicorn.Config(
        create_app(service),
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )


def serve(
    service: Service,
    listener: socket.socket,
    engine: EngineProcess,
    launch: Callable[[], EngineProcess],
    announce: Announce,
) -> None:
    """Run a server to its end; raises what ended it, returns after a signal.

    `engine` is a process that was started already, `launch` starts another when it dies.
    """

    async def run() -> None:
        lifecycle = Lifecycle(service, launch, announce)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, lifecycle.stop)
        await lifecycle.run(listener, engine)

    with asyncio.Runner(loop_factory=http_config(service).get_loop_factory()) as runner:
        runner.run(run())
