"""The two ends of an engine process: streams, aborts, and ends of every kind."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quantlab.errors import CheckpointError, EngineDied
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams, TokenEvent
from quantlab.server.engine_client import EngineClient, EngineProcess, TokenStream, launch
from tests.server.running import launcher


@contextlib.asynccontextmanager
async def engine(process: EngineProcess | None = None, pace: float = 0.0) -> AsyncIterator[EngineClient]:
    client = EngineClient(process or launcher(pace)())
    try:
        await client.ready()
        yield client
    finally:
        await client.stop()


def request(name: str, prompt: tuple[int, ...] = (5, 6, 7), max_tokens: int = 4, salt: str = "") -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), cache_salt=salt)


async def all_of(stream: TokenStream, ends: int) -> list[TokenEvent]:
    """Events until `ends` requests have ended."""
    events: list[TokenEvent] = []
    while sum(event.finish_reason is not None for event in events) < ends:
        events += await stream.next()
    return events


def test_requests_of_one_caller_share_a_stream() -> None:
    async def run() -> None:
        async with engine() as client, client.stream([request("a"), request("b", (8, 9))]) as stream:
            events = await all_of(stream, 2)
            tokens = {name: [t for e in events if e.request_id == name for t in e.token_ids] for name in "ab"}
            assert tokens == {"a": [5, 6, 7, 5], "b": [8, 9, 8, 9]}
            assert client.in_flight == 0

    asyncio.run(run())


def test_leaving_the_block_aborts_what_has_not_ended() -> None:
    async def run() -> None:
        async with engine(pace=0.01) as client:
            async with client.stream([request("a", max_tokens=200)]) as stream:
                await stream.next()
                assert client.stats.running == 1
                free = client.stats.blocks_free
            async with client.stream([request("b", max_tokens=1)]) as stream:
                await all_of(stream, 1)
            assert client.stats.running == 0 and client.stats.blocks_free > free

    asyncio.run(run())


def test_a_request_that_cannot_be_ends_alone() -> None:
    async def run() -> None:
        async with engine() as client:
            async with client.stream([request("a", prompt=(9999,))]) as stream:
                (event,) = await all_of(stream, 1)
                assert event.finish_reason == "error" and event.error
            async with client.stream([request("b")]) as stream:
                assert await all_of(stream, 1)

    asyncio.run(run())


def test_an_engine_that_ends_is_everybodys_error() -> None:
    async def run() -> None:
        async with engine(pace=0.01) as client:
            async with client.stream([request("a", max_tokens=200)]) as stream:
                await stream.next()
                os.kill(client.process.pid, signal.SIGTERM)  # not this one's to obey
                await stream.next()
                os.kill(client.process.pid, signal.SIGKILL)
                with pytest.raises(EngineDied, match="SIGKILL"):
                    await all_of(stream, 1)
            assert not client.alive and "SIGKILL" in client.death.result().message
            with pytest.raises(EngineDied):
                async with client.stream([request("b")]):
                    pass

    asyncio.run(run())


def test_what_goes_wrong_while_building_is_raised_as_it_was() -> None:
    async def run() -> None:
        client = EngineClient(launcher(0.0, Path("broken"))())
        with pytest.raises(CheckpointError, match="a tensor is missing"):
            await client.ready()
        await client.stop()
        assert client.process.returncode is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit(7)", "exited with code 7"),
        ("import socket, sys; socket.socket(fileno=int(sys.argv[1])).sendall(b'\\0\\0\\0\\3abc')", "no message"),
        ("import socket, sys; socket.socket(fileno=int(sys.argv[1])).sendall(b'\\xff\\xff\\xff\\xff')", "no message"),
    ],
)
def test_a_process_that_is_no_engine_is_told(code: str, told: str) -> None:
    async def run() -> None:
        client = EngineClient(launch(Path("somewhere"), EngineOptions(), (sys.executable, "-c", code)))
        with pytest.raises(EngineDied, match=told):
            await client.ready()
        await client.stop()

    asyncio.run(run())


def test_an_engine_ends_when_nobody_holds_the_other_end() -> None:
    process = launcher(0.0)()
    process.connection.close()
    assert process.process.wait(20) == 0


def test_an_engine_ends_when_the_other_end_goes_without_having_read_what_it_said() -> None:
    process = launcher(0.0)()
    assert select.select([process.connection], [], [], 20)[0], "it is built and waits for requests"
    process.connection.close()
    assert process.process.wait(20) == 0


def test_ctrl_c_in_a_terminal_is_not_the_engines_to_hear() -> None:
    process = launcher(0.0)()
    group = os.getpgid(process.process.pid)
    process.connection.close()
    process.process.wait(20)
    assert group == process.process.pid != os.getpgid(0)


def test_an_engine_that_is_ready_when_nobody_waits_any_more_ends_well() -> None:
    async def run() -> int | None:
        client = EngineClient(launcher(0.0)())
        building = asyncio.create_task(client.ready())
        await asyncio.sleep(0.01)
        building.cancel()
        while client.info is None:
            await asyncio.sleep(0.01)
        await client.stop()
        return client.process.returncode

    assert asyncio.run(run()) == 0


def test_a_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.server.engine_client.STOP_SECONDS", 0.2)

    async def run() -> subprocess.Popen[bytes]:
        sleeper = (sys.executable, "-c", "import time; time.sleep(100)")
        client = EngineClient(launch(Path("somewhere"), EngineOptions(), sleeper))
        building = asyncio.create_task(client.ready())
        await asyncio.sleep(0)
        await client.stop()
        with pytest.raises(EngineDied):
            await building
        return client.process

    assert asyncio.run(run()).returncode == -signal.SIGKILL
