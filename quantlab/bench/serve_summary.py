"""From outcomes to figures: latencies as percentiles, rates, goodput, and failures by name.

Plain Python, so that a result can be read and checked anywhere. Knows nothing about HTTP or how figures are shown.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantlab.bench.serve_client import Outcome
from quantlab.bench.serve_load import Loaded
from quantlab.bench.serve_options import Level, Limits
from quantlab.bench.serve_watch import Sample

MAX_FAILURES, MAX_ROWS, CURVE, SLICES = 12, 5000, 101, 120
OTHERS = "other failures"


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of `count` measurements. `curve` has the 0 to 100 % quantiles, for plots; `count` 0 has zeros."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float
    curve: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The figures of `values`."""
        ordered = sorted(values)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, ())
        middle, high, top = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
        curve = tuple(quantile(ordered, step / (CURVE - 1)) for step in range(CURVE))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), middle, high, top, ordered[-1], curve)


@dataclass(frozen=True, slots=True)
class Moment:
    """One slice of a level's time: seconds since its beginning, requests under way, pieces of text a second."""

    at: float
    under_way: float
    pieces: float


@dataclass(frozen=True, slots=True)
class LevelResult:
    """One level's figures. Rates are over the whole level, its beginning and end included; tokens are the server's.

    `good` requests met every limit, None without limits. `late` is how far behind the client itself was at worst (99 %
    of requests): with more than a few milliseconds the client, not the server, was measured. `requests` has
    (seconds since the beginning, TTFT, whole, prompt tokens, output tokens) of those that succeeded.
    """

    name: str
    concurrency: int | None
    rate: float | None
    seconds: float
    sent: int
    succeeded: int
    failures: dict[str, int]
    counted_by_server: bool
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    good: int | None
    late: float
    timeline: tuple[Moment, ...]
    server: tuple[Sample, ...]
    requests: tuple[tuple[float, float, float, int, int], ...]

    @property
    def value(self) -> float:
        """The load's place on an axis."""
        return Level(self.concurrency, self.rate).value

    @property
    def request_rate(self) -> float:
        """Answers a second."""
        return self.succeeded / self.seconds

    @property
    def output_rate(self) -> float:
        """Output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Prompt and output tokens a second."""
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def goodput(self) -> float | None:
        """Answers a second that met every limit."""
        return None if self.good is None else self.good / self.seconds

    def as_json(self) -> dict[str, Any]:
        """Every figure, the rates among them."""
        rates = ("request_rate", "output_rate", "total_rate", "goodput")
        return asdict(self) | {name: getattr(self, name) for name in rates}


def summarize(level: Level, loaded: Loaded, limits: Limits, server: Sequence[Sample] = ()) -> LevelResult:
    """The figures of one level."""
    good = [outcome for outcome in loaded.outcomes if outcome.failure is None]
    return LevelResult(
        name=level.name,
        concurrency=level.concurrency,
        rate=level.rate,
        seconds=max(loaded.ended - loaded.began, 1e-9),
        sent=len(loaded.outcomes),
        succeeded=len(good),
        failures=count_failures(loaded.outcomes),
        counted_by_server=all(outcome.counted for outcome in good),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        cached_tokens=sum(outcome.cached_tokens for outcome in good),
        output_tokens=sum(outcome.output_tokens for outcome in good),
        ttft=Spread.of(o.ttft for o in good if o.ttft is not None),
        itl=Spread.of(gap for o in good for gap in o.gaps),
        tpot=Spread.of(o.tpot for o in good if o.tpot is not None),
        e2e=Spread.of(o.e2e for o in good),
        good=sum(meets(outcome, limits) for outcome in good) if limits else None,
        late=Spread.of(o.sent - o.due for o in loaded.outcomes).p99,
        timeline=timeline(loaded),
        server=tuple(server),
        requests=_rows(good, loaded.began),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, between two of them on the line through both."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def meets(outcome: Outcome, limits: Limits) -> bool:
    """Whether an answer kept every limit; a time that it does not have (one token has no TPOT) is kept."""
    pairs = ((outcome.ttft, limits.ttft), (outcome.tpot, limits.tpot), (outcome.e2e, limits.e2e))
    return all(limit is None or value is None or value <= limit for value, limit in pairs)


def count_failures(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How often each failure came, the most frequent first; rare kinds beyond MAX_FAILURES together."""
    counts = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None).most_common()
    shown = dict(counts[:MAX_FAILURES])
    left = sum(count for _, count in counts[MAX_FAILURES:])
    return shown | ({OTHERS: left} if left else {})


def timeline(loaded: Loaded) -> tuple[Moment, ...]:
    """SLICES slices of the level's time."""
    width = max(loaded.ended - loaded.began, 1e-9) / SLICES
    under_way, pieces = [0.0] * SLICES, [0.0] * SLICES
    for outcome in loaded.outcomes:
        start, stop = ((at - loaded.began) / width for at in (outcome.sent, outcome.last))
        for index in range(max(0, int(start)), min(SLICES, int(stop) + 1)):
            under_way[index] += max(0.0, min(stop, index + 1) - max(start, index))
        for at in _arrivals(outcome):
            pieces[min(SLICES - 1, max(0, int((at - loaded.began) / width)))] += 1 / width
    return tuple(Moment(width * (i + 0.5), under_way[i], pieces[i]) for i in range(SLICES))


def _arrivals(outcome: Outcome) -> Iterable[float]:
    if outcome.first is None:
        return
    at = outcome.first
    yield at
    for gap in outcome.gaps:
        at += gap
        yield at


def _rows(good: Sequence[Outcome], began: float) -> tuple[tuple[float, float, float, int, int], ...]:
    """At most MAX_ROWS requests, evenly chosen."""
    step = -(-len(good) // MAX_ROWS) or 1
    return tuple((o.due - began, o.ttft or 0.0, o.e2e, o.prompt_tokens, o.output_tokens) for o in good[::step])
