"""The page with a scripted server behind it: answers word by word, counts that grow, and faults on demand."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from quantlab.server.page_files import HEADERS, assets

WORDS = ["<b>Call</b>", "me", "Ishmael", ".", "Some", "years", "ago", "never", "mind", "how", "long", "precisely"]


@dataclass
class Script:
    """How the server behaves, and what it was asked."""

    chat_template: bool = True
    gap: float = 0.001
    phase: str = "ready"
    fault: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    left: int = 0
    tokens: int = 0
    url: str = ""


def event(body: dict[str, Any], word: str, finish: str | None = None) -> bytes:
    """One piece of an answer; with logprobs an unlikely word now and then."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if "messages" in body:
        choice["delta"] = {"content": word}
        if body.get("logprobs"):
            logprob = -3.0 if word.strip() == "never" else -0.01
            tops = [{"token": word, "logprob": logprob}]
            choice["logprobs"] = {"content": [{"token": word, "logprob": logprob, "top_logprobs": tops}]}
    else:
        choice["text"] = word
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def answer(request: web.Request) -> web.StreamResponse:
    """WORDS, one at a time."""
    script: Script = request.app[SCRIPT]
    body = await request.json()
    script.bodies.append(body)
    script.paths.append(request.path)
    if script.fault:
        return web.json_response({"error": {"message": script.fault}}, status=400)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    try:
        count = min(body["max_tokens"], 10_000)
        for index in range(count):
            await asyncio.sleep(script.gap)
            await response.write(event(body, f"{WORDS[index % len(WORDS)]} ", "length" if index + 1 == count else None))
            script.tokens += 1
        usage = {"prompt_tokens": 12, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 8}}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
    except ConnectionError:
        script.left += 1
    return response


async def models(request: web.Request) -> web.Response:
    """One model."""
    script: Script = request.app[SCRIPT]
    card = {"id": "books<5m>", "max_model_len": 1024, "scheme": "w4a16", "device": "cpu", "kernels": ["w4a16: 28"]}
    return web.json_response({"data": [card | {"chat_template": script.chat_template}]})


async def ready(request: web.Request) -> web.Response:
    """The phase."""
    phase = request.app[SCRIPT].phase
    return web.json_response({"status": phase}, status=200 if phase == "ready" else 503)


async def metrics(request: web.Request) -> web.Response:
    """Counters that follow the answers."""
    tokens = request.app[SCRIPT].tokens
    buckets = "".join(
        f'quantlab:time_to_first_token_seconds_bucket{{le="{bound}",model_name="m"}} {count}\n'
        for bound, count in (("0.1", 0), ("0.2", tokens), ("+Inf", tokens))
    )
    values = {"num_requests_running": 3, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.5,
              "generation_tokens_total": tokens, "prompt_tokens_total": 12, "num_preemptions_total": 0,
              "prefix_cache_queries_total": 2 * tokens, "prefix_cache_hits_total": tokens}  # fmt: skip
    lines = "".join(f'quantlab:{name}{{model_name="m"}} {value}\n' for name, value in values.items())
    return web.Response(text=f"# HELP a b\n{buckets}{lines}")


def page_route(path: str) -> Any:
    """A handler that sends one of the page's files, as the server does."""

    async def send(request: web.Request) -> web.Response:
        asset = assets()[path]
        return web.Response(body=asset.content, headers={**HEADERS, "Content-Type": asset.media_type})

    return send


SCRIPT = web.AppKey("script", Script)


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    """The page and its server on a free port, until the block ends."""
    app = web.Application()
    app[SCRIPT] = script
    app.add_routes([web.get(path, page_route(path)) for path in assets()])
    app.add_routes([web.post("/v1/completions", answer), web.post("/v1/chat/completions", answer)])
    app.add_routes([web.get("/v1/models", models), web.get("/ready", ready), web.get("/metrics", metrics)])
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        script.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert started.wait(10)
        yield script
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
