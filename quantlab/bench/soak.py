"""A server under more than it can take, for minutes: `python -m quantlab.bench.soak`.

First measures what the server gives, then sends a fifth more than that, and looks at what must hold: every request is
answered or refused, memory does not grow, first tokens come no later than the queue's length explains, every block of
keys and values is free again at the end. Exits with 1 if something does not hold.
usage: python -m quantlab.bench.soak [--model DIR] [--seconds 600] [--load 1.2]
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import aiohttp
from rich.console import Console
from rich.table import Table

from quantlab.bench.measure import SHIPPED_MODEL, append_rows
from quantlab.bench.own_server import OwnServer, own_server
from quantlab.bench.serve_client import Body, Outcome, ask, new_session
from quantlab.bench.serve_load import put_load
from quantlab.bench.serve_options import Level, Limits, Span, Target, Work
from quantlab.bench.serve_prompts import Rate, requests
from quantlab.bench.serve_summary import LevelResult, summarize
from quantlab.bench.serve_table import rate, seconds
from quantlab.bench.serve_watch import read_gauges
from quantlab.errors import QuantlabError
from quantlab.units import human_bytes

SLOTS, QUEUE = 16, 48
REFUSED = "HTTP 429"
MAX_GROWTH = 0.02
QUEUE_MARGIN = 2.0  # a queue's wait is its length over the rate, which is not the same from second to second
SETTLE_SECONDS = 30.0
WORK = Work(Span(16, 200), Span(8, 64), ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that must hold."""

    what: str
    found: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Soaked:
    """A soak's figures; `resident` in bytes at the beginning and at the end, `capacity` in requests a second."""

    capacity: float
    level: LevelResult
    resident: tuple[float, float]
    blocks_used: float
    still_answers: bool

    @property
    def lost(self) -> dict[str, int]:
        """Failures that are no refusals."""
        return {name: count for name, count in self.level.failures.items() if not name.startswith(REFUSED)}

    @property
    def refused(self) -> int:
        """Requests that were turned away."""
        return sum(count for name, count in self.level.failures.items() if name.startswith(REFUSED))

    @property
    def longest_wait(self) -> float:
        """Seconds to a first token that a full queue explains."""
        return QUEUE_MARGIN * (QUEUE + SLOTS) / self.capacity

    def verdicts(self) -> list[Verdict]:
        """What must hold, and whether it does."""
        level, (before, after) = self.level, self.resident
        growth = after / before - 1
        total = level.succeeded + self.refused
        wait = f"{seconds(level.ttft.p99)}, at most {seconds(self.longest_wait)}"
        return [
            Verdict("every request is answered or refused", f"{total:,} of {level.sent:,}", not self.lost),
            Verdict(
                "memory stays",
                f"{human_bytes(before)} to {human_bytes(after)}, {100 * growth:+.2f} %",
                growth < MAX_GROWTH,
            ),
            Verdict("first tokens within the queue's wait (99 %)", wait, level.ttft.p99 <= self.longest_wait),
            Verdict("no block of keys and values is kept", f"{100 * self.blocks_used:.1f} %", self.blocks_used == 0),
            Verdict("the next request is answered", "yes" if self.still_answers else "no", self.still_answers),
        ]


def soak(folder: Path, duration: float, load: float, work: Path, words: Sequence[str] = ()) -> Soaked:
    """Put `load` times what the server gives on it for `duration` seconds; raises QuantlabError if it cannot start."""
    limits = ["--max-num-seqs", str(SLOTS), "--max-queue", str(QUEUE)]
    with own_server(folder, [*limits, *words], work / "serve.log") as server:
        found = asyncio.run(_soak(server, duration, load))
        if code := server.stop():
            raise QuantlabError(f"the server ended with {code}", where=str(work / "serve.log"))
    return found


async def _soak(server: OwnServer, duration: float, load: float) -> Soaked:
    target = Target(server.url, timeout=120)
    async with new_session(target) as session:

        async def one(body: Body, due: float) -> Outcome:
            return await ask(session, target, body, due)

        bodies = requests(target, str(server.ready["name"]), WORK, Rate(), "soak")
        trial = Level(concurrency=SLOTS + QUEUE // 2)
        measured = await put_load(trial, bodies, 1_000_000, max(2.0, duration / 20), one)
        capacity = summarize(trial, measured, Limits()).request_rate
        if not capacity:
            raise QuantlabError("the server answers nothing", where=server.url)
        level = Level(rate=load * capacity)
        sizes: list[int] = []
        watcher = asyncio.create_task(_watch_memory(server, sizes))
        loaded = await put_load(level, bodies, 1_000_000, duration, one)
        watcher.cancel()
        result = summarize(level, loaded, Limits())
        used = await _settled(session, target)
        after = await ask(session, target, next(bodies), perf_counter())
    tenth = max(1, len(sizes) // 10)
    resident = statistics.median(sizes[:tenth]), statistics.median(sizes[-tenth:])
    return Soaked(capacity, result, resident, used, after.failure is None)


async def _watch_memory(server: OwnServer, sizes: list[int]) -> None:
    while True:
        sizes.append(server.resident())
        await asyncio.sleep(0.5)


async def _settled(session: aiohttp.ClientSession, target: Target) -> float:
    """The share of blocks in use when nothing runs any more, or after SETTLE_SECONDS."""
    begin, gauges = perf_counter(), (1.0, 1.0, 1.0)
    while any(gauges) and perf_counter() - begin < SETTLE_SECONDS:
        gauges = await read_gauges(session, target.root) or gauges
        await asyncio.sleep(0.2)
    return gauges[2]


def table(found: Soaked) -> Table:
    """What must hold, line by line."""
    level = found.level
    title = (
        f"{level.seconds:.0f} s at {level.name}, where the server gives {rate(found.capacity)}: "
        f"{level.succeeded:,} answered, {found.refused:,} refused; first token {seconds(level.ttft.p50)} (median)"
    )
    view = Table(title=title, title_justify="left")
    for column in ("what must hold", "found", ""):
        view.add_column(column)
    for verdict in found.verdicts():
        view.add_row(verdict.what, verdict.found, "yes" if verdict.holds else "NO")
    return view


def main() -> None:
    """Soak, print, exit with 1 if something does not hold."""
    parser = argparse.ArgumentParser(description="a server under more than it can take")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="the shipped model by default")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--load", type=float, default=1.2, help="times what the server gives")
    parser.add_argument("--threads", type=int, default=1, help="of the server's engine")
    parser.add_argument("--work", type=Path, default=Path("work/bench/soak"))
    parser.add_argument("--rows", type=Path, help="append the figures as a JSON line to this file")
    asked = parser.parse_args()
    try:
        found = soak(asked.model, asked.seconds, asked.load, asked.work, ["--threads", str(asked.threads)])
    except QuantlabError as error:
        sys.exit(error.one_line())
    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
    for name, count in found.lost.items():
        sys.stderr.write(f"lost: {count} x {name}\n")
    verdicts = [asdict(verdict) for verdict in found.verdicts()]
    level = {k: v for k, v in found.level.as_json().items() if k not in ("timeline", "server", "requests")}
    row = {"bench": "soak", "model": asked.model.name, "load": asked.load, "capacity": found.capacity}
    append_rows(asked.rows, [row | {"verdicts": verdicts, "level": level, "resident": found.resident}])
    sys.exit(0 if all(verdict.holds for verdict in found.verdicts()) else 1)


if __name__ == "__main__":
    main()
