"""Clients that read slowly, or not at all."""

import json
import socket

import pytest

from tests.server.conftest import Start

BODY = {"prompt": "It was a dark", "max_tokens": 250, "n": 128, "logprobs": 20, "stream": True, "ignore_eos": True}


def ask(url: str) -> socket.socket:
    """A connection on which a request has been made whose answer is far larger than any buffer."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    body = json.dumps(BODY).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_reads_nothing_is_left(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quantlab.server.streaming.SEND_SECONDS", 0.5)
    server = start(engine={"max_num_seqs": 128})
    with ask(server.url) as connection:
        server.until(lambda: server.service.admission.requests == 1)
        server.until(lambda: server.service.admission.requests == 0)
        received = b""
        while part := connection.recv(1 << 20):
            received = part
        assert not received.endswith(b"0\r\n\r\n")  # the connection was closed before the end
    assert "has read nothing" in caplog.text
    assert server.complete("It was", max_tokens=2).status_code == 200


def test_a_slow_client_gets_all_of_it_in_larger_pieces(start: Start) -> None:
    server = start(engine={"max_num_seqs": 128})
    with ask(server.url) as connection:
        server.until(lambda: server.service.stats().generation_tokens == 250 * 128)  # and none of it read
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1 << 20)
    assert received.count(b'"finish_reason":"length"') == 128
    assert received.count(b"data: {") < 250 * 128
    assert b"data: [DONE]" in received
