"""What a quantization run tells whoever watches it: plain values, sent to one callback.

Knows nothing about terminals; `cli.progress` draws these, tests collect them, `--json` prints them.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run's size: `blocks` to do of which `resumed` are already on disk; `stages` names the later stages."""

    blocks: int
    resumed: int
    tokens: int
    stages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleDone:
    """One linear solved; errors are relative squared output errors on held-out blocks (dimensionless)."""

    block: int
    name: str
    method: str
    error: float
    rtn_error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class BlockDone:
    """One decoder block on disk; `error` is the relative squared error of its output against 16-bit."""

    block: int
    blocks: int
    error: float
    seconds: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """Progress inside a long stage (`distill`, `verify`, `replay`, `write`); `loss` where the stage has one."""

    stage: str
    step: int
    steps: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """One sentence the user should see (a retry, a module kept at RTN, a resume)."""

    text: str


Event = RunStarted | ModuleDone | BlockDone | StepDone | Notice
Listener = Callable[[Event], None]
