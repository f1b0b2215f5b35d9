"""A tiny OpenAI-compatible server that does what a script says: the other end for tests of the load generator.

A real server on a real socket, in a thread of its own; it knows no model.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKENS_PER_WORD, FRAME = 2, 3


@dataclass
class Script:
    """How the server behaves; `fail` maps the number of a request, from 0 on, to what goes wrong with it."""

    model: str = "scripted"
    first: float = 0.0
    gap: float = 0.0
    usage: bool = True
    key: str | None = None
    gauges: bool = False
    fail: dict[int, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    url: str = ""


async def answer(request: web.Request) -> web.StreamResponse:
    """One request, as the script has it."""
    script: Script = request.app[SCRIPT]
    body = await request.json()
    number = len(script.bodies)
    script.bodies.append(body)
    if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
        return web.json_response({"error": {"message": "wrong key"}}, status=401)
    what = script.fail.get(number, "")
    if what.isdigit():
        return web.json_response({"error": {"message": "the queue is full"}}, status=int(what))
    if what == "plain":
        return web.json_response({"choices": []})
    script.under_way += 1
    script.most_under_way = max(script.most_under_way, script.under_way)
    try:
        return await stream(request, body, what)
    finally:
        script.under_way -= 1


async def stream(request: web.Request, body: dict[str, Any], what: str) -> web.StreamResponse:
    """The tokens of an answer, one event each, in two writes where the script cuts events in half."""
    script: Script = request.app[SCRIPT]
    chat = request.path.endswith("chat/completions")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await asyncio.sleep(script.first)
    if chat:
        await send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for index in range(body["max_tokens"]):
        if index:
            await asyncio.sleep(script.gap)
        if what == "drop" and index == 2:
            request.transport.close() if request.transport else None
            return response
        choice = {"delta": {"content": f" w{index}"}} if chat else {"text": f" w{index}"}
        await send(response, {"choices": [choice]}, halves=what == "halves")
    if what == "broken":
        await response.write(b"data: {not json\n\n")
    if what == "error":
        await send(response, {"error": {"message": "the engine died"}})
    if script.usage:
        await send(response, {"choices": [], "usage": usage(body)})
    if what != "endless":
        await response.write(b"data: [DONE]\n\n")
    return response


def usage(body: dict[str, Any]) -> dict[str, Any]:
    """Counts of a tokenizer with TOKENS_PER_WORD tokens a word and FRAME tokens around them."""
    text = body.get("prompt") or body["messages"][0]["content"]
    tokens = len(text) if isinstance(text, list) else FRAME + TOKENS_PER_WORD * len(text.split())
    details = {"cached_tokens": tokens // 4}
    return {"prompt_tokens": tokens, "completion_tokens": body["max_tokens"], "prompt_tokens_details": details}


async def send(response: web.StreamResponse, event: dict[str, Any], halves: bool = False) -> None:
    """One event, perhaps cut in two by the network."""
    data = b"data: " + json.dumps(event).encode() + b"\r\n\r\n"
    for part in (data[:9], data[9:]) if halves else (data,):
        await response.write(part)
        await asyncio.sleep(0.005 if halves else 0)


async def models(request: web.Request) -> web.Response:
    """The list of one model."""
    script: Script = request.app[SCRIPT]
    if script.key and request.headers.get("Authorization") != f"Bearer {script.key}":
        return web.json_response({"error": {"message": "wrong key"}}, status=401)
    return web.json_response({"object": "list", "data": [{"id": script.model, "max_model_len": 4096}]})


async def metrics(request: web.Request) -> web.Response:
    """A Prometheus page of three gauges, where the script has one."""
    script: Script = request.app[SCRIPT]
    if not script.gauges:
        return web.Response(status=404)
    values = {"num_requests_running": script.under_way, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.25}
    lines = [f'vllm:{name}{{model_name="scripted"}} {float(value)}' for name, value in values.items()]
    return web.Response(text="# HELP nothing\n" + "\n".join(lines) + "\n")


async def version(request: web.Request) -> web.Response:
    """Which server this is."""
    return web.json_response({"version": "1.2.3"})


SCRIPT = web.AppKey("script", Script)


@contextmanager
def serving(script: Script) -> Iterator[Script]:
    """The script's server on a free port of this machine, until the block ends."""
    app = web.Application()
    app[SCRIPT] = script
    app.add_routes([web.post("/v1/completions", answer), web.post("/v1/chat/completions", answer)])
    app.add_routes([web.get("/v1/models", models), web.get("/metrics", metrics), web.get("/version", version)])
    started, loop = threading.Event(), asyncio.new_event_loop()

    async def run(stop: asyncio.Event) -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        script.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        started.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run(stop)))
    thread.start()
    try:
        assert started.wait(10)
        yield script
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
