"""The engine's loop goes on while a grammar is compiled, and a request that was aborted meanwhile never begins."""

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantlab.runtime.options import EngineInfo, EngineOptions, EngineStats
from quantlab.runtime.request import Grammar, Request, SamplingParams, TokenEvent
from quantlab.server.engine_loop import Inbox, _work
from quantlab.server.messages import LENGTH, REPORTS, Abort, Add, Step, Stop, frame_length
from tests.server.scripted_engine import build

SECONDS = 20


class SlowGrammars:
    """The scripted engine, with grammars that are compiled when the test says so."""

    def __init__(self) -> None:
        self._engine = build(0.0, Path("somewhere"), EngineOptions())
        self.begun, self.compiled = threading.Event(), threading.Event()
        self.added: list[str] = []
        self.threads: list[str] = []
        self.prepared: list[Grammar] = []

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, request: Request) -> None:
        self.added.append(request.request_id)
        self._engine.add(request)

    def prepare(self, grammar: Grammar) -> None:
        self.threads.append(threading.current_thread().name)
        self.prepared.append(grammar)
        self.begun.set()
        assert self.compiled.wait(SECONDS)

    def abort(self, request_id: str) -> bool:
        return self._engine.abort(request_id)

    def step(self) -> list[TokenEvent]:
        return self._engine.step()

    def stats(self) -> EngineStats:
        return self._engine.stats()


class Reports:
    """What the loop says."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        self._file = connection.makefile("rb")

    def until_end_of(self, name: str) -> list[TokenEvent]:
        """All events up to the last one of request `name`."""
        events: list[TokenEvent] = []
        while not any(event.request_id == name and event.finish_reason for event in events):
            report = REPORTS.decode(self._file.read(frame_length(self._file.read(LENGTH.size))))
            assert isinstance(report, Step)
            events += report.events
        return events


@contextmanager
def loop(engine: SlowGrammars) -> Iterator[tuple[Inbox, Reports]]:
    inbox: Inbox = queue.SimpleQueue()
    ours, theirs = socket.socketpair()
    working = threading.Thread(target=_work, args=(engine, inbox, theirs))
    working.start()
    with ours, theirs:
        try:
            yield inbox, Reports(ours)
        finally:
            inbox.put(Stop())
            working.join(SECONDS)  # whatever is being compiled
            engine.compiled.set()
    assert not working.is_alive()


def request(name: str, grammar: Grammar | None = None) -> Add:
    return Add(Request(name, (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True, grammar=grammar)))


def test_others_are_answered_while_a_grammar_is_compiled() -> None:
    engine = SlowGrammars()
    with loop(engine) as (inbox, reports):
        inbox.put(request("waits", Grammar("json_object")))
        inbox.put(request("goes"))
        assert {event.request_id for event in reports.until_end_of("goes")} == {"goes"}
        engine.compiled.set()
        assert [token for event in reports.until_end_of("waits") for token in event.token_ids] == [5, 6, 7]
    assert engine.threads == ["grammar_0"] and engine.added == ["goes", "waits"]


def test_a_request_that_is_aborted_while_its_grammar_is_compiled_never_begins() -> None:
    engine = SlowGrammars()
    with loop(engine) as (inbox, reports):
        inbox.put(request("leaves", Grammar("json_object")))
        inbox.put(Abort("leaves"))
        inbox.put(request("goes"))
        reports.until_end_of("goes")
        engine.compiled.set()
        inbox.put(request("stays", Grammar("json_object")))
        reports.until_end_of("stays")
    assert engine.added == ["goes", "stays"]


def test_the_grammar_of_a_request_that_left_before_its_turn_is_not_compiled() -> None:
    engine = SlowGrammars()
    first, second, third = (Grammar("json_schema", f'{{"const": {number}}}') for number in range(3))
    with loop(engine) as (inbox, reports):
        inbox.put(request("waits", first))
        inbox.put(request("leaves", second))
        inbox.put(request("comes", third))
        assert engine.begun.wait(SECONDS)
        inbox.put(Abort("leaves"))
        inbox.put(request("goes"))
        reports.until_end_of("goes")
        engine.compiled.set()
        reports.until_end_of("comes")
    assert engine.prepared == [first, third]


def test_no_more_is_compiled_once_the_loop_is_told_to_stop() -> None:
    engine = SlowGrammars()
    with loop(engine) as (inbox, _):
        for number in range(3):
            inbox.put(request(str(number), Grammar("json_schema", f'{{"const": {number}}}')))
        assert engine.begun.wait(SECONDS)
    for thread in threading.enumerate():
        if thread.name == "grammar_0":
            thread.join(SECONDS)
    assert len(engine.prepared) == 1
