"""What the events of a run add up to: rows, rates and the time that is left.

A plain state machine over `events` and a clock; knows nothing about terminals.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from quantlab.events import BlockDone, Event, ModuleDone, RunStarted, StepDone


@dataclass
class Tracker:
    """The run so far. `clock` returns seconds; resumed blocks do not count towards the rate."""

    clock: Callable[[], float]
    blocks: int = 0
    done: int = 0
    fresh: int = 0
    started: float = 0.0
    stage: str = ""
    stage_started: float = 0.0
    ratios: list[float] = field(default_factory=list)
    all_ratios: list[float] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Take one event into account; call before asking for the row it makes."""
        if isinstance(event, RunStarted):
            self.blocks, self.done = event.blocks, event.resumed
            self.started = self.clock()
        elif isinstance(event, ModuleDone):
            if event.rtn_error > 0 and event.error >= 0:
                ratio = max(event.error / event.rtn_error, 1e-6)
                self.ratios.append(ratio)
                self.all_ratios.append(ratio)
        elif isinstance(event, BlockDone):
            self.done += 1
            self.fresh += 1
        elif isinstance(event, StepDone) and event.stage != self.stage:
            self.stage, self.stage_started = event.stage, self.clock()

    def gain(self) -> float | None:
        """How much lower this block's module errors are than plain RTN's (geometric mean, 0.4 for 40 %); then reset."""
        ratios, self.ratios = self.ratios, []
        return _gain(ratios)

    def total_gain(self) -> float | None:
        """The same over every module so far."""
        return _gain(self.all_ratios)

    def blocks_left(self) -> float | None:
        """Seconds until the last block, or None before the first."""
        if not self.fresh:
            return None
        return (self.clock() - self.started) / self.fresh * (self.blocks - self.done)

    def stage_spent(self) -> float:
        """Seconds since the stage's first step was told."""
        return self.clock() - self.stage_started

    def stage_left(self, event: StepDone) -> float | None:
        """Seconds until a stage's last step, or None before its first."""
        spent = self.stage_spent()
        return spent / event.step * (event.steps - event.step) if event.step and spent else None


def _gain(ratios: list[float]) -> float | None:
    if not ratios:
        return None
    return 1.0 - math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
