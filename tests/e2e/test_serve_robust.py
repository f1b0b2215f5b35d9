"""What befalls a server: clients that leave, an engine that is killed, signals, more requests than it can take."""

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.e2e.served import SMALL, Served, serving, until

PROMPT = "The captain looked at the sea and said"
LONG = 1500


def body(tokens: int, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} | fields


def idle(served: Served) -> bool:
    """Whether nothing runs or waits, and every block may be handed out again."""
    now = served.metrics()
    quiet = now["num_requests_running"] == now["num_requests_waiting"] == 0
    return quiet and now["kv_blocks_free"] == now["kv_blocks"]


async def _flood(served: Served, stay: int, leave: int) -> list[Any]:
    """`stay` requests that are waited for, among `leave` that are cut off while they wait or run."""
    limit = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int, tokens: int) -> Any:
            wanted = body(tokens, f"{number} {PROMPT}", stream=number % 2 == 0)
            async with session.post(f"{served.url}/v1/completions", json=wanted) as response:
                return response.status, await response.text()

        async def cut(number: int) -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(number, LONG), 0.1 + 0.005 * number)

        leaving = [cut(number) for number in range(leave)]
        staying = [ask(leave + number, 10) for number in range(stay)]
        done = await asyncio.gather(*leaving, *staying)
    return done[leave:]


def test_clients_that_leave_give_back_every_block_and_sigterm_lets_the_rest_end(books_5m: Path) -> None:
    with serving(books_5m, *SMALL, "--max-queue", "512", "--no-prefix-caching") as served:
        assert idle(served)
        answers = asyncio.run(_flood(served, stay=100, leave=200))
        assert [status for status, _ in answers] == [200] * 100
        until(lambda: idle(served))
        assert served.http.post("/v1/completions", json=body(5), timeout=10).status_code == 200
        counts = served.metrics()
        assert counts["request_success_total"] >= 101
        # What was cut off stopped at once: far fewer tokens than were asked for.
        assert counts["generation_tokens_total"] < 0.5 * 200 * LONG
        _assert_drains(served)


def _assert_drains(served: Served) -> None:
    """SIGTERM: no new work, what is under way is answered whole, exit code 0."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{served.url}/v1/completions", json=body(600), timeout=60, trust_env=False)
        until(lambda: served.metrics()["num_requests_running"] == 1)
        served.process.terminate()
        until(lambda: served.http.get("/ready").status_code == 503, 5)
        refused = served.http.post("/v1/completions", json=body(5))
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert asked.result(timeout=60).json()["usage"]["completion_tokens"] == 600
        assert served.end()[0] == 0


def test_a_killed_engine_ends_its_requests_and_the_server_with_a_code(books_5m: Path) -> None:
    with serving(books_5m, *SMALL) as served, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(_told, served, stream) for stream in (True, False, True)]
        until(lambda: served.metrics()["num_requests_running"] == 3)
        os.kill(served.engine_pid(), signal.SIGKILL)
        until(lambda: served.http.get("/health").status_code == 503, 5)
        told = [each.result(timeout=20) for each in asked]
        assert all("error" in text and "[DONE]" not in text for text in told), told
        code, errors = served.end()
    assert code == 14
    assert "QL1401" in errors and "Traceback" not in errors


def _told(served: Served, stream: bool) -> str:
    """Everything that a long request is told before its end."""
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body(LONG, stream=stream), timeout=30, trust_env=False
    ) as response:
        assert response.status_code == (200 if stream else 500)
        return response.read().decode()


def test_another_engine_takes_over_where_that_is_wanted_and_none_is_left_behind(books_5m: Path) -> None:
    with serving(books_5m, *SMALL, "--restart-engine") as served:
        first = served.engine_pid()
        before = served.http.post("/v1/completions", json=body(8)).json()["choices"][0]["text"]
        os.kill(first, signal.SIGKILL)
        until(lambda: served.http.get("/ready").status_code == 503, 5)
        until(lambda: served.http.get("/ready").status_code == 200, 60)
        assert served.http.post("/v1/completions", json=body(8)).json()["choices"][0]["text"] == before
        second = served.engine_pid()
        assert second != first
        served.process.kill()
        until(lambda: not Path(f"/proc/{second}").exists())


KEY = {"Authorization": "Bearer a-long-enough-key"}


async def _burst(served: Served, count: int) -> list[tuple[int, str | None]]:
    async with aiohttp.ClientSession(headers=KEY, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> tuple[int, str | None]:
            wanted = body(30, f"{number} {PROMPT}")
            async with session.post(f"{served.url}/v1/completions", json=wanted) as response:
                await response.read()
                return response.status, response.headers.get("Retry-After")

        return list(await asyncio.gather(*(ask(number) for number in range(count))))


def test_keys_guard_every_route_and_a_full_queue_refuses_without_losing_anything(
    books_5m: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the tests\na-long-enough-key\n")
    words = ("--api-key-file", str(keys), "--max-num-seqs", "4", "--max-queue", "8", "--drain-seconds", "0.3")
    with serving(books_5m, *SMALL, *words) as served:
        for path in ("/v1/models", "/metrics", "/version", "/", "/page.js", "/openapi.json", "/nowhere"):
            assert served.http.get(path).status_code == 401, path
        assert served.http.post("/v1/completions", json=body(5)).status_code == 401
        for path in ("/health", "/ready"):
            assert served.http.get(path).status_code == 200, path
        served.http.headers.update(KEY)
        answers = asyncio.run(_burst(served, 80))
        refused = [after for status, after in answers if status == 429]
        assert {status for status, _ in answers} == {200, 429}
        assert len(refused) >= 40 and all(after is not None and int(after) >= 1 for after in refused)
        assert served.metrics()["admission_rejections_total"] == len(refused)
        until(lambda: idle(served))
        assert served.http.post("/v1/completions", json=body(5)).status_code == 200
        _assert_ends_in_time(served)


def _assert_ends_in_time(served: Served) -> None:
    """SIGTERM with a request that is longer than the drain may take: it is told so, and the exit code is 0."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(served.http.post, "/v1/completions", json=body(2000))
        until(lambda: served.metrics()["num_requests_running"] == 1)
        served.process.terminate()
        assert served.end(20)[0] == 0
        assert asked.result(timeout=20).status_code == 503
