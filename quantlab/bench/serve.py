"""A load test of any OpenAI-compatible server: find its model, learn its token counts, put each load on it, sum up.

Knows nothing about how results are shown or kept.
"""

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import aiohttp

from quantlab.bench.serve_client import Outcome, ask, new_session
from quantlab.bench.serve_load import Ask, put_load
from quantlab.bench.serve_options import Level, LoadOptions, Target
from quantlab.bench.serve_prompts import Rate, probes, requests
from quantlab.bench.serve_result import LoadResult, Server, now
from quantlab.bench.serve_summary import LevelResult, summarize
from quantlab.bench.serve_watch import Sample, watch
from quantlab.errors import EndpointError, printable

MAX_WARMUP = 16
MODELS_FIX = "an OpenAI-compatible address such as http://127.0.0.1:8000/v1"
REACH_FIX = "--base-url with the address of a server that runs, such as http://127.0.0.1:8000/v1"
KEY_FIX = "--api-key KEY, or QUANTLAB_API_KEY"
Told = Callable[[LevelResult], None]


def run_load(options: LoadOptions, told: Told) -> LoadResult:
    """Put every level on the server, telling each level's result as it ends.

    Raises EndpointError where nothing could be measured, and TextError for prompts that cannot be read.
    """
    return asyncio.run(_run(options, told))


async def _run(options: LoadOptions, told: Told) -> LoadResult:
    async with new_session(options.target) as session:
        server = await describe(session, options.target)
        rate = await learn_rate(session, options, server.model)
        levels = []
        for level in options.levels:
            levels.append(await _measure(session, options, level, (server.model, rate)))
            told(levels[-1])
    if not any(level.succeeded for level in levels):
        reason = next((name for level in levels for name in level.failures), "no request was sent")
        raise EndpointError(f"no request succeeded: {reason}", where=options.target.base_url)
    return LoadResult(options, server, rate, tuple(levels), now())


async def describe(session: aiohttp.ClientSession, target: Target) -> Server:
    """The model to ask and what the server says of it; raises EndpointError if it cannot be reached or lacks it."""
    cards = await _models(session, target)
    names = [str(card.get("id")) for card in cards]
    model = target.model or (names[0] if names else None)
    if model is None or (names and model not in names):
        known = ", ".join(printable(name) for name in names[:8]) or "a model that it has"
        raise EndpointError(f"has no model {model or ''}".rstrip(), where=target.base_url, fix=f"--model {known}")
    card = next((card for card in cards if card.get("id") == model), {})
    return Server(model, card, await _version(session, target))


async def _models(session: aiohttp.ClientSession, target: Target) -> list[dict[str, Any]]:
    try:
        async with session.get(target.url("models")) as response:
            if response.status in (401, 403):
                reason = f"wants {'another' if target.api_key else 'a'} key: HTTP {response.status}"
                raise EndpointError(reason, where=target.base_url, fix=KEY_FIX)
            if response.status != 200:
                reason = f"has no list of models: HTTP {response.status}"
                raise EndpointError(reason, where=target.base_url, fix=MODELS_FIX)
            listed = (await response.json(content_type=None))["data"]
            return [card for card in listed if isinstance(card, dict)]
    except (KeyError, TypeError, ValueError) as error:
        raise EndpointError("has no list of models", where=target.base_url, fix=MODELS_FIX) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        reason = f"cannot be reached: {_cause(error)}"
        raise EndpointError(reason, where=target.base_url, fix=REACH_FIX) from error


def _cause(error: Exception) -> str:
    """Why there is no connection, in the words of the system where it gave any."""
    number = getattr(error, "errno", None) or 0
    told = os.strerror(number) if number in errno.errorcode else str(error) or "no answer in time"
    return printable(told)[:120]


async def _version(session: aiohttp.ClientSession, target: Target) -> str:
    """What /version says, in one line; nothing where there is no such route."""
    with suppress(aiohttp.ClientError, ValueError, TimeoutError):
        async with session.get(f"{target.root}/version") as response:
            if response.status == 200:
                return printable(str((await response.json(content_type=None)).get("version", "")))[:80]
    return ""


async def learn_rate(session: aiohttp.ClientSession, options: LoadOptions, model: str) -> Rate:
    """How many tokens the server counts for words; raises EndpointError if it does not answer at all."""
    counts = []
    for body in probes(options.target, model, options.work):
        outcome = await ask(session, options.target, body, perf_counter())
        if outcome.failure is not None:
            raise EndpointError(f"fails the first request: {outcome.failure}", where=options.target.base_url)
        counts.append(outcome.prompt_tokens)
    return Rate.from_probes(counts)


async def _measure(
    session: aiohttp.ClientSession, options: LoadOptions, level: Level, found: tuple[str, Rate]
) -> LevelResult:
    """One level: the warm-up, then the load with the server's own gauges beside it."""
    target, (model, rate) = options.target, found
    await _warm_up(session, options, level, found)
    bodies = requests(target, model, options.work, rate, level.name)
    samples: list[Sample] = []
    watcher = asyncio.create_task(watch(session, target.root, perf_counter(), samples))
    try:
        loaded = await put_load(level, bodies, options.requests, options.seconds, _asker(session, target))
    finally:
        watcher.cancel()
    return summarize(level, loaded, options.limits, samples)


async def _warm_up(session: aiohttp.ClientSession, options: LoadOptions, level: Level, found: tuple[str, Rate]) -> None:
    under_way = level.concurrency or MAX_WARMUP
    count = min(under_way, MAX_WARMUP) if options.warmup is None else options.warmup
    if count:
        bodies = requests(options.target, found[0], options.work, found[1], "warm-up")
        await put_load(Level(concurrency=under_way), bodies, count, None, _asker(session, options.target))


def _asker(session: aiohttp.ClientSession, target: Target) -> Ask:
    async def one(body: Any, due: float) -> Outcome:
        return await ask(session, target, body, due)

    return one
