"""The loop of the engine's process: commands in, one report a step out, until the other side closes.

It ends the process by itself when the front process is gone, however that ended. Knows nothing about HTTP, text or how
tokens are computed.
"""

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantlab.errors import QuantlabError
from quantlab.log import logger
from quantlab.runtime.options import EngineInfo, EngineOptions, EngineStats
from quantlab.runtime.request import Grammar, Request, TokenEvent
from quantlab.server.messages import (
    Abort,
    Add,
    Command,
    Ready,
    Report,
    Start,
    Step,
    Stop,
    failure,
    frame,
    receive_command,
)

LOG = logger(__name__)


class EngineLike(Protocol):
    """What of an engine this process uses."""

    @property
    def info(self) -> EngineInfo:
        """What was built."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def add(self, request: Request) -> None:
        """Begin a request; raises QuantlabError or ValueError for one that cannot be."""

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar, in another thread than the rest."""

    def abort(self, request_id: str) -> bool:
        """Forget a request; returns whether it was known."""

    def step(self) -> list[TokenEvent]:
        """Go on by one step."""

    def stats(self) -> EngineStats:
        """Counts so far."""


Build = Callable[[Path, EngineOptions], EngineLike]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose grammar is compiled."""

    add: Add


Inbox = queue.SimpleQueue[Command | Prepared]


class Preparing:
    """Requests whose grammars are being compiled in a thread, one after the other, while the loop goes on."""

    def __init__(self, prepare: Callable[[Grammar], None], inbox: Inbox):
        self._prepare, self._inbox = prepare, inbox
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._waiting: dict[str, Future[None]] = {}

    def begin(self, add: Add, grammar: Grammar) -> None:
        """Put `add` back into the inbox, as Prepared, once its grammar is compiled."""
        self._waiting[add.request.request_id] = self._compiler.submit(self._compile, add, grammar)

    def end(self, request_id: str) -> bool:
        """Forget a request, whose grammar is not compiled any more unless that has begun; returns whether it waited."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.cancel()
        return waiting is not None

    def close(self) -> None:
        """Compile no more: the process would not end before all of it is done."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def _compile(self, add: Add, grammar: Grammar) -> None:
        try:
            self._prepare(grammar)
        finally:
            self._inbox.put(Prepared(add))  # the engine tells what is wrong with it


def serve(descriptor: int, build: Build) -> int:
    """Serve the socket `descriptor` until it closes; returns the exit code."""
    # Ctrl-C goes to every process of a terminal, and a service manager may signal the whole group: it is the front
    # process that decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    start = receive_command(connection)
    if not isinstance(start, Start):
        return 0
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        engine = build(Path(start.folder), start.options)
        _send(connection, Ready(engine.info))
        _send(connection, Step([], engine.stats()))
        _work(engine, inbox, connection)
    except Exception as error:
        if not isinstance(error, QuantlabError):
            LOG.exception("the engine process ends")
        _send(connection, failure(error))
        return error.exit_code if isinstance(error, QuantlabError) else 1
    return 0


def _listen(connection: socket.socket, inbox: Inbox) -> None:
    """Move commands to `inbox`; ends the whole process when the other side is gone, whatever it is busy with."""
    with suppress(ConnectionError):  # what it is when the other side went without having read all that it was told
        while (command := receive_command(connection)) is not None:
            inbox.put(command)
    os._exit(0)


def _work(engine: EngineLike, inbox: Inbox, connection: socket.socket) -> None:
    """Steps while there is work, waiting for commands while there is none."""
    with closing(Preparing(engine.prepare, inbox)) as preparing:
        while True:
            events: list[TokenEvent] = []
            for command in _pending(inbox, wait=not engine.has_work):
                if isinstance(command, Stop):
                    return
                events += _apply(engine, preparing, command)
            if engine.has_work:
                events += engine.step()
            _send(connection, Step(events, engine.stats()))


def _pending(inbox: Inbox, wait: bool) -> list[Command | Prepared]:
    """All commands that have come, with `wait` at least one."""
    commands = [inbox.get()] if wait else []
    while not inbox.empty():
        commands.append(inbox.get())
    return commands


def _apply(engine: EngineLike, preparing: Preparing, command: Command | Prepared) -> list[TokenEvent]:
    """Carry out one command; a request that cannot be ends alone."""
    if isinstance(command, Abort):
        preparing.end(command.request_id)
        engine.abort(command.request_id)
    elif isinstance(command, Prepared):
        return _add(engine, command.add.request) if preparing.end(command.add.request.request_id) else []
    elif isinstance(command, Add):
        grammar = command.request.params.grammar
        if grammar is None:
            return _add(engine, command.request)
        preparing.begin(command, grammar)
    return []


def _add(engine: EngineLike, request: Request) -> list[TokenEvent]:
    try:
        engine.add(request)
    except (QuantlabError, ValueError) as error:
        return [TokenEvent(request.request_id, finish_reason="error", error=str(error))]
    return []


def _send(connection: socket.socket, report: Report) -> None:
    try:
        connection.sendall(frame(report))
    except OSError:
        os._exit(0)  # the front process is gone
