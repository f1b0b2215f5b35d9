"""What the engine's death does, what a full queue and a leaving client do, and how a server drains."""

import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import Start
from tests.server.serving import Asking, Server, events

SLOW = {"max_tokens": 200, "ignore_eos": True}


def in_flight(server: Asking, count: int) -> bool:
    return server.metric("num_requests_running") == count


def asking(server: Asking, pool: ThreadPoolExecutor, **fields: object) -> "Future[httpx.Response]":
    return pool.submit(server.complete, "It was a dark", **{**SLOW, **fields})


def test_the_engine_killed_means_errors_at_once_then_the_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.server.lifecycle.LINGER_SECONDS", 4.0)  # this machine may be slow
    server = start(pace=0.2)
    with ThreadPoolExecutor() as pool:
        whole, streamed = asking(server, pool), asking(server, pool, stream=True)
        server.until(lambda: in_flight(server, 2))
        os.kill(server.engine_pid, signal.SIGKILL)
        answers = (whole.result(), streamed.result())  # it would have taken 40 s to make them
        assert server.http.get("/health").status_code == 503
        assert server.complete("a").status_code == 503
    assert answers[0].status_code == 500
    assert "SIGKILL" in answers[0].json()["error"]["message"]
    assert events(answers[1])[-1]["error"]["code"] == "engine_died"
    error = server.wait()
    assert error is not None and error.code == "QL1401"


@pytest.mark.parametrize(("accident", "told"), [("crash", "exited with code 3"), ("raise", "the device is on fire")])
def test_an_engine_that_breaks_says_how(start: Start, accident: str, told: str) -> None:
    server = start()
    error = server.complete("a", cache_salt=accident).json()["error"]
    assert told in error["message"]
    ended = server.wait()
    assert ended is not None and told in ended.message


def test_an_engine_that_hangs_is_taken_for_dead(start: Start) -> None:
    server = start(hang_seconds=0.5)
    assert server.complete("a", max_tokens=1).status_code == 200
    time.sleep(0.6)  # saying nothing is right when there is nothing to do
    assert server.complete("a", max_tokens=1).status_code == 200
    assert server.complete("a", cache_salt="hang").json()["error"]["code"] == "engine_died"
    assert server.wait() is not None


def test_an_engine_that_is_restarted_answers_again_until_it_is_given_up(start: Start) -> None:
    server = start(restart_engine=True)
    for _ in range(3):
        assert server.complete("a", cache_salt="crash").status_code == 500
        server.until(lambda: server.http.get("/ready").status_code == 200)
        assert server.complete("It was", max_tokens=2).status_code == 200
    assert server.metric("engine_restarts_total") == 3
    assert server.complete("a", cache_salt="crash").status_code == 500
    error = server.wait()
    assert error is not None and error.exit_code == 14


def test_a_server_that_loads_is_alive_but_not_ready_and_ends_when_told(books_5m: Path, tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to(books_5m)
    server = Server(tmp_path / "endless", {}, wait=False)
    server.until(lambda: server.http.get("/health").json()["status"] == "loading")
    assert server.http.get("/ready").status_code == 503
    for answer in (server.complete("a"), server.http.get("/v1/models"), server.post("/tokenize", {"prompt": "a"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert answer.headers["retry-after"]
    assert server.http.get("/metrics").status_code == 200
    server.stop()
    assert server.wait() is None


def test_draining_lets_what_is_under_way_come_to_its_end(start: Start) -> None:
    server = start(pace=0.01)
    with ThreadPoolExecutor() as pool:
        answer = asking(server, pool, stream=True)
        server.until(lambda: in_flight(server, 1))
        server.stop()
        server.until(lambda: server.http.get("/ready").status_code == 503)
        assert server.http.get("/health").json()["status"] == "draining"
        refused = server.complete("a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "5"
        assert events(answer.result())[-1] == "[DONE]"
    assert server.wait() is None


def test_the_drain_has_an_end(start: Start) -> None:
    server = start(pace=0.2, drain_seconds=0.2)
    with ThreadPoolExecutor() as pool:
        whole, streamed = asking(server, pool), asking(server, pool, stream=True)
        server.until(lambda: in_flight(server, 2))
        server.stop()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "draining")
        assert events(streamed.result())[-1]["error"]["code"] == "draining"
    assert server.wait() is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(start: Start, stream: bool) -> None:
    server = start(pace=0.02)
    free = server.metric("kv_blocks_free")
    body = {"prompt": "It was a dark", "stream": stream, **SLOW}
    with httpx.Client(base_url=server.url, timeout=0.5, trust_env=False) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert next(answer.iter_bytes()).startswith(b"data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    server.until(lambda: in_flight(server, 0) and server.metric("kv_blocks_free") == free)
    assert server.metric("request_success_total") == 1


def test_a_full_queue_refuses_and_says_when_to_come_again(start: Start) -> None:
    server = start(pace=0.01, max_queue=1, engine={"max_num_seqs": 1})
    with ThreadPoolExecutor() as pool:
        running = asking(server, pool)
        server.until(lambda: in_flight(server, 1))
        waiting = asking(server, pool)
        server.until(lambda: server.metric("num_requests_waiting") == 1)
        refused = server.complete("a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert server.metric("admission_rejections_total") == 1
        assert running.result().status_code == waiting.result().status_code == 200
    assert server.complete("a", max_tokens=1).status_code == 200


def test_many_that_leave_do_not_hold_up_the_next(start: Start) -> None:
    server = start(pace=0.01, max_queue=500)
    free = server.metric("kv_blocks_free")

    def leave() -> None:
        with httpx.Client(base_url=server.url, timeout=0.5, trust_env=False) as client, pytest.raises(httpx.HTTPError):
            client.post("/v1/completions", json={"prompt": "It was a dark", "max_tokens": 250, "ignore_eos": True})

    threads = [threading.Thread(target=leave) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.complete("a", max_tokens=2).status_code == 200
    server.until(lambda: server.metric("kv_blocks_free") == free)


def test_time_in_the_queue_is_told_apart_from_the_first_token(start: Start) -> None:
    server = start(pace=0.01, engine={"max_num_seqs": 1})
    with ThreadPoolExecutor() as pool:
        answers = [asking(server, pool, max_tokens=50) for _ in range(2)]
        assert {answer.result().status_code for answer in answers} == {200}
    assert server.metric("request_queue_time_seconds_count") == 2
    waited, first = (server.metric(f"{name}_seconds_sum") for name in ("request_queue_time", "time_to_first_token"))
    assert 0.4 < waited < first
