"""What load to put on which server, as plain values with bounds.

Knows nothing about HTTP, tokenizers or how results are shown.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from quantlab.errors import UsageError

Api = Literal["completions", "chat"]
MAX_CONCURRENCY, MAX_RATE, MAX_REQUESTS, MAX_TOKENS = 8192, 100_000.0, 1_000_000, 1 << 20
MAX_LEVELS, MAX_SECONDS = 32, 86_400.0


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenAI-compatible server. `base_url` ends in /v1; `model` None is the first one that it names."""

    base_url: str
    model: str | None = None
    api: Api = "completions"
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"is no http address: {self.base_url!r}", where="--base-url", fix="http://HOST:PORT/v1")

    @property
    def root(self) -> str:
        """The address without /v1, where /metrics and /health are."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    def url(self, path: str) -> str:
        """The address of a route under /v1."""
        return f"{self.root}/v1/{path}"


@dataclass(frozen=True, slots=True)
class Span:
    """A number of tokens drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> "Span":
        """`128` or `64:256`; raises UsageError."""
        low, colon, high = text.partition(":")
        words = (low, high if colon else low)
        if not all(word.isascii() and word.isdecimal() and len(word) < 9 for word in words):
            raise UsageError(f"is neither a number nor LOW:HIGH: {text!r}", where=option, fix=f"{option} 64:256")
        found = cls(int(words[0]), int(words[1]))
        if not 1 <= found.low <= found.high <= MAX_TOKENS:
            raise UsageError(f"must rise within 1 and {MAX_TOKENS}: {text!r}", where=option, fix=f"{option} 64:256")
        return found

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Work:
    """What every request asks: passages of the bundled text of `input` tokens, or the lines of `prompts`.

    The first `shared_prefix` tokens of a passage are the same in all requests. `ignore_eos` makes every answer as long
    as asked; it is an extension of the protocol that not every server knows.
    """

    input: Span = Span(128, 128)
    output: Span = Span(128, 128)
    prompts: Path | None = None
    shared_prefix: int = 0
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shared_prefix and self.prompts:
            raise UsageError("the file's prompts are sent as they are", where="--shared-prefix", fix="leave out one")
        if not 0 <= self.shared_prefix < MAX_TOKENS:
            raise UsageError(f"is not within 0 and {MAX_TOKENS}", where="--shared-prefix")
        if not 0 <= self.temperature <= 2:
            raise UsageError("is not within 0 and 2", where="--temperature")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a good answer takes at most: to its first token, between tokens on average, to its end."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft, self.tpot, self.e2e))


@dataclass(frozen=True, slots=True)
class Level:
    """One load: `concurrency` requests always under way (closed loop), or `rate` arriving each second (open loop)."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """`32 concurrent` or `4 a second`."""
        return f"{self.concurrency} concurrent" if self.concurrency is not None else f"{self.rate:g} a second"

    @property
    def value(self) -> float:
        """Its place on an axis."""
        return float(self.concurrency if self.concurrency is not None else self.rate or 0.0)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Levels one after the other, each with `requests` requests or until `seconds` have passed, whichever is first.

    `warmup` requests go before each level and count nowhere; None: as many as the level has under way, at most 16.
    """

    target: Target
    levels: tuple[Level, ...]
    work: Work = Work()
    limits: Limits = Limits()
    requests: int = 200
    seconds: float | None = None
    warmup: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.levels) <= MAX_LEVELS:
            raise UsageError(f"1 to {MAX_LEVELS} loads can be asked for", where="--concurrency", fix="--concurrency 32")
        if not 1 <= self.requests <= MAX_REQUESTS:
            raise UsageError(f"is not within 1 and {MAX_REQUESTS}", where="--requests", fix="--requests 200")


def parse_levels(concurrency: str | None, rate: str | None) -> tuple[Level, ...]:
    """The loads of `1,8,32` requests under way, or of `2,4.5` arrivals a second; raises UsageError."""
    if (concurrency is None) == (rate is None):
        reason = "give either --concurrency (closed loop) or --rate (open loop)"
        raise UsageError(reason, where="--concurrency", fix="--concurrency 1,8,32")
    if concurrency is not None:
        counts = [_number(word, "--concurrency", MAX_CONCURRENCY) for word in concurrency.split(",")]
        if any(count != int(count) for count in counts):
            raise UsageError("is no whole number of requests", where="--concurrency", fix="--concurrency 1,8,32")
        return tuple(Level(concurrency=int(count)) for count in counts)
    return tuple(Level(rate=_number(word, "--rate", MAX_RATE)) for word in str(rate).split(","))


def _number(word: str, option: str, most: float) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise UsageError(f"is not above 0 and at most {most:g}: {word.strip()!r}", where=option)
    return value
