"""What the server says of itself while it is loaded: a few gauges from its Prometheus page, sampled now and then.

Takes the names that vLLM and quantlab share, whatever prefix stands before them; a server without the page gives
nothing. Knows nothing about the load.
"""

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import aiohttp

PERIOD = 0.5
LINE = re.compile(r"^(?:[a-z_]+:)?([a-z_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)", re.MULTILINE)
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds since the level began; requests running and waiting; the share of the KV cache in use, 0 to 1."""

    at: float
    running: float
    waiting: float
    kv_usage: float


async def watch(session: aiohttp.ClientSession, root: str, began: float, samples: list[Sample]) -> None:
    """Append a sample every PERIOD seconds until cancelled; ends by itself where there is no such page."""
    with suppress(aiohttp.ClientError, TimeoutError, OSError):
        while (found := await read_gauges(session, root)) is not None:
            samples.append(Sample(perf_counter() - began, *found))
            await asyncio.sleep(PERIOD)


async def read_gauges(session: aiohttp.ClientSession, root: str) -> tuple[float, float, float] | None:
    """(running, waiting, KV share) of the server at `root`, or None where it does not say."""
    async with session.get(f"{root}/metrics") as response:
        if response.status != 200:
            return None
        return parse_gauges((await response.read()).decode("utf-8", "replace"))


def parse_gauges(text: str) -> tuple[float, float, float] | None:
    """The GAUGES in a Prometheus page, those of several engines added and KV shares averaged; None without all."""
    found: dict[str, list[float]] = {}
    for name, value in LINE.findall(text):
        if name in GAUGES:
            with suppress(ValueError):
                found.setdefault(name, []).append(float(value))
    if len(found) < len(GAUGES):
        return None
    running, waiting, usage = (found[name] for name in GAUGES)
    return sum(running), sum(waiting), sum(usage) / len(usage)
