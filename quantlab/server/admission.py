"""Who may come in: limits on what waits, and a guess at when to come again.

Knows nothing about HTTP or engines; it is told what began, what ended and what the engine last said.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from quantlab.runtime.options import EngineStats

RECENT: Final = 64
MAX_RETRY_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The most sequences, and the most tokens of their prompts, that may wait for their first token."""

    requests: int
    tokens: int


class QueueFull(Exception):
    """Too much waits already; `reason` names the limit, `retry_after` is in seconds."""

    def __init__(self, message: str, reason: str, retry_after: int):
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Ticket:
    """The place of one HTTP request's sequences, from its arrival to its end."""

    def __init__(self, sequences: int):
        self.sequences = sequences
        self.tokens = 0
        self.started = 0


class Admission:
    """Counts of what is in the server. A sequence waits until its first token has come."""

    def __init__(self, limits: QueueLimits, stats: Callable[[], EngineStats], now: Callable[[], float]):
        self._limits = limits
        self._stats = stats
        self._now = now
        self._tickets: set[Ticket] = set()
        self._ended: deque[float] = deque(maxlen=RECENT)
        self.slots = 0

    @property
    def requests(self) -> int:
        """HTTP requests that are in."""
        return len(self._tickets)

    @property
    def sequences(self) -> int:
        """Sequences that are in."""
        return sum(ticket.sequences for ticket in self._tickets)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the prompts of sequences whose first token has not come."""
        return sum(ticket.tokens // ticket.sequences * (ticket.sequences - ticket.started) for ticket in self._tickets)

    @contextmanager
    def enter(self, sequences: int) -> Iterator[Ticket]:
        """A place for `sequences`, given back at the end of the block; raises QueueFull."""
        waiting = max(0, self.sequences - self._running())
        if self.sequences and self.sequences + sequences > self._running() + self._limits.requests:
            message = f"{waiting} requests wait already, of {self._limits.requests} that may"
            raise QueueFull(message, "queue_full", self._retry_after(waiting))
        ticket = Ticket(sequences)
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.discard(ticket)
            self._ended.extend([self._now()] * sequences)

    def count(self, ticket: Ticket, tokens: int) -> None:
        """Say how many tokens the prompts of a ticket's sequences have together; raises QueueFull.

        A prompt that is longer than the limit is let in when nothing else waits: it could never come in otherwise.
        """
        waiting = self.waiting_tokens
        if waiting and waiting + tokens > self._limits.tokens:
            message = f"prompts of {waiting} tokens wait already, of {self._limits.tokens} that may"
            raise QueueFull(message, "queue_tokens", self._retry_after(self.sequences))
        ticket.tokens = tokens

    def start(self, ticket: Ticket) -> None:
        """The first token of one of the ticket's sequences has come."""
        ticket.started += 1

    def _running(self) -> int:
        """Sequences that the engine can run: when some wait in it, no more than it runs now."""
        stats = self._stats()
        return min(stats.running, self.slots) if stats.waiting else self.slots

    def _retry_after(self, waiting: int) -> int:
        """Seconds until what waits is gone, at the pace of late."""
        if len(self._ended) < 2 or self._ended[-1] <= self._ended[0]:
            return 1
        pace = (len(self._ended) - 1) / (self._now() - self._ended[0])
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(waiting / pace)))
