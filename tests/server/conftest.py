"""Servers for tests: one that a module shares, and others with options of their own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server

Start = Callable[..., Server]


@pytest.fixture(scope="module")
def server(books_5m: Path) -> Iterator[Server]:
    """A server with the shipped model's tokenizer and the scripted engine."""
    started = Server(books_5m, {})
    yield started
    code, errors = started.stop()
    assert code == 0, errors
    assert errors == ""


@pytest.fixture
def start(books_5m: Path) -> Iterator[Start]:
    """Starts servers with options; they end with the test."""
    servers: list[Server] = []

    def begin(folder: Path | None = None, **options: Any) -> Server:
        servers.append(Server(folder or books_5m, options))
        return servers[-1]

    yield begin
    for one in servers:
        one.stop()
