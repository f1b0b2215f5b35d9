"""Wall seconds of a run, stage by stage.

Knows nothing about what the stages do.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall seconds by stage of this process; a continued run counts only its own."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time under `name`."""
        started = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - started
