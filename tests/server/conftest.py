"""Servers for tests: one that a module shares, and others with options of their own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import RealServer, Server

Start = Callable[..., Server]
StartReal = Callable[..., RealServer]


@pytest.fixture(scope="module")
def server(books_5m: Path) -> Iterator[Server]:
    """A server with the shipped model's tokenizer and the scripted engine."""
    started = Server(books_5m, {})
    yield started
    started.stop()
    assert started.wait() is None


@pytest.fixture
def start(books_5m: Path) -> Iterator[Start]:
    """Starts servers with options; they end with the test."""
    servers: list[Server] = []

    def begin(**options: Any) -> Server:
        servers.append(Server(books_5m, options))
        return servers[-1]

    yield begin
    for one in servers:
        one.stop()
        one.wait()


@pytest.fixture
def start_real(books_5m: Path) -> Iterator[StartReal]:
    """Starts servers in processes of their own; they end with the test."""
    servers: list[RealServer] = []

    def begin(**options: Any) -> RealServer:
        servers.append(RealServer(books_5m, options))
        return servers[-1]

    yield begin
    for one in servers:
        if one.process.poll() is None:
            one.process.kill()
            one.wait()
