"""What may cross between the processes, and what ends the connection."""

import socket
import struct

import msgspec
import pytest

from quantlab.errors import CheckpointError, QuantlabError
from quantlab.runtime.options import EngineOptions, EngineStats
from quantlab.runtime.request import Grammar, Request, SamplingParams, TokenEvent, TokenLogprobs
from quantlab.server.messages import (
    LENGTH,
    MAX_FRAME,
    REPORTS,
    Abort,
    Add,
    Command,
    Start,
    Step,
    Stop,
    failure,
    frame,
    raised,
    receive_command,
)

REQUEST = Request(
    "a",
    (1, 2, 3),
    SamplingParams(logit_bias=((5, -1.5),), seed=7, grammar=Grammar("json_schema", "{}"), max_tokens=None),
    -3,
    "salt",
)


def sent(data: bytes) -> Command | None:
    """What the other side makes of `data`, after which the connection closes."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        return receive_command(theirs)


@pytest.mark.parametrize("command", [Start("folder", EngineOptions(kv_memory=5)), Add(REQUEST), Abort("a"), Stop()])
def test_a_command_arrives_as_it_was(command: Command) -> None:
    assert sent(frame(command)) == command


def test_a_step_arrives_as_it_was() -> None:
    logprobs = TokenLogprobs(-0.5, 2, ((1, -0.1), (2, float("-inf"))))
    event = TokenEvent("a", (1,), (logprobs,), "stop", 1, 4, (None, logprobs), "broken", 0.25)
    step = Step([event], EngineStats(running=3, blocks_free=9))
    assert REPORTS.decode(frame(step)[LENGTH.size :]) == step


@pytest.mark.parametrize("data", [b"", b"\x00\x00", struct.pack(">I", 5) + b"abc"])
def test_a_connection_that_ends_early_is_an_end(data: bytes) -> None:
    assert sent(data) is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME + 1),
        struct.pack(">I", 3) + b"abc",
        struct.pack(">I", 4) + msgspec.msgpack.encode({"x": 1}),
        frame(Step([], EngineStats())),
    ],
)
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        sent(data)


def test_a_request_with_a_field_of_another_type_is_refused() -> None:
    body = msgspec.msgpack.encode({"type": "add", "request": {"request_id": "a", "prompt_ids": ["x"], "params": {}}})
    with pytest.raises(msgspec.ValidationError, match="prompt_ids"):
        sent(LENGTH.pack(len(body)) + body)


def test_an_error_arrives_as_the_class_that_it_was() -> None:
    error = raised(failure(CheckpointError("damaged", where="here", fix="again")))
    assert isinstance(error, CheckpointError)
    assert (error.message, error.where, error.fix) == ("damaged", "here", "again")
    other = raised(failure(RuntimeError("first line\nsecond")))
    assert type(other) is QuantlabError and other.message == "RuntimeError: first line"
