"""Progress of a run on stderr: a live table row and bar on a terminal, one plain line a block when piped.

Knows nothing about quantization: it draws `events`.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from quantlab.cli.tracker import Tracker
from quantlab.errors import printable
from quantlab.events import BlockDone, Event, ModuleDone, Notice, RunStarted, StepDone
from quantlab.units import human_count, human_seconds

PLAIN_EVERY = 10.0  # seconds between two plain lines of one stage
ROW = "{block:>9}  {error:>9}  {gain:>8}  {seconds:>7}  {left:>8}"
HEADER = ROW.format(block="block", error="error", gain="vs RTN", seconds="time", left="left")


class View(Protocol):
    """Something that draws a run while it is entered."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, event: Event) -> None: ...


def make_view(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> View:
    """A live view if `stream` is a terminal, plain lines otherwise."""
    return LiveView(Console(file=stream, highlight=False), clock) if stream.isatty() else PlainView(stream, clock)


def row(tracker: Tracker, event: BlockDone) -> str:
    """One finished block: number, relative output error, gain over RTN, time, time left."""
    return ROW.format(
        block=f"{event.block + 1}/{event.blocks}",
        error=f"{event.error:.2e}",
        gain=show_gain(tracker.gain()),
        seconds=human_seconds(event.seconds),
        left=_left(tracker.blocks_left()),
    )


def show_gain(gain: float | None) -> str:
    """`-42 %`: how much lower than RTN's the errors are."""
    if gain is None:
        return "-"
    percent = round(-100 * gain)
    return f"{percent:+d} %" if percent else "0 %"


def start_line(event: RunStarted) -> str:
    """The run's size in a line."""
    resumed = f", {event.resumed} of them done before" if event.resumed else ""
    stages = f", then {', '.join(event.stages)}" if event.stages else ""
    tokens = f" on {human_count(event.tokens)} tokens" if event.tokens else ""
    return f"{event.blocks} blocks{resumed}{tokens}{stages}"


def step_line(tracker: Tracker, event: StepDone) -> str:
    """A stage's progress in a line."""
    loss = "" if event.loss is None else f"  loss {event.loss:.4g}"
    return f"{event.stage} {event.step}/{event.steps}{loss}  left {_left(tracker.stage_left(event))}"


def stage_line(tracker: Tracker, event: StepDone) -> str:
    """A finished stage in a line."""
    loss = "" if event.loss is None else f", loss {event.loss:.4g}"
    return f"{event.stage}: {event.steps} steps in {human_seconds(tracker.stage_spent())}{loss}"


def _left(seconds: float | None) -> str:
    return "-" if seconds is None else human_seconds(max(0.0, seconds))


class PlainView:
    """Plain lines for logs: one for each block, one every ten seconds of a later stage."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]):
        self.stream = stream
        self.clock = clock
        self.tracker = Tracker(clock)
        self.last = float("-inf")
        self.pending: list[
            str
        ] = []  # the start, told with the first thing done: a run that fails at once says one line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.flush()

    def __call__(self, event: Event) -> None:
        """Write what `event` is worth a line for."""
        self.tracker.add(event)
        if isinstance(event, RunStarted):
            self.pending = [start_line(event), HEADER]
        elif isinstance(event, BlockDone):
            self._line(row(self.tracker, event))
        elif isinstance(event, StepDone):
            now = self.clock()
            if event.step >= event.steps or now - self.last >= PLAIN_EVERY:
                self.last = now
                self._line(step_line(self.tracker, event))
        elif isinstance(event, Notice):
            self._line(f"note: {printable(event.text)}")

    def _line(self, text: str) -> None:
        lines, self.pending = [*self.pending, text], []
        self.stream.writelines(line.rstrip() + "\n" for line in lines)
        self.stream.flush()


class LiveView:
    """Rows that scroll up and a bar that stays, naming the module at work."""

    def __init__(self, console: Console, clock: Callable[[], float]):
        self.console = console
        self.tracker = Tracker(clock)
        self.progress = Progress(
            SpinnerColumn(style="cyan"),
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=28, complete_style="cyan", finished_style="green"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.headed = False

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        """Draw `event`."""
        self.tracker.add(event)
        if isinstance(event, RunStarted):
            self.console.print(Text(start_line(event), style="dim"))
            self._update("blocks", event.resumed, event.blocks, "reading")
        elif isinstance(event, ModuleDone):
            left = self.tracker.blocks_left()
            ahead = "" if left is None else f", {_left(left)} left"
            note = f"block {event.block + 1}: {event.name.split('.')[-1]} {event.method}{ahead}"
            self._update("blocks", self.tracker.done, self.tracker.blocks, printable(note))
        elif isinstance(event, BlockDone):
            self._block(event)
        elif isinstance(event, StepDone):
            loss = "" if event.loss is None else f"loss {event.loss:.4g}, "
            note = f"{loss}{_left(self.tracker.stage_left(event))} left"
            self._update(event.stage, event.step, event.steps, note)
            if event.step >= event.steps:
                self.console.print(Text(stage_line(self.tracker, event), style="dim"))
        else:
            self.console.print(Text.assemble(("note ", "yellow"), printable(event.text)))

    def _block(self, event: BlockDone) -> None:
        if not self.headed:
            self.console.print(Text(HEADER, style="bold"))
            self.headed = True
        line = Text(row(self.tracker, event))
        line.highlight_regex(r"-\d+ %", "green")
        line.highlight_regex(r"\+\d+ %", "yellow")
        self.console.print(line)
        left = self.tracker.blocks_left()
        self._update("blocks", self.tracker.done, self.tracker.blocks, f"{_left(left)} left")

    def _update(self, stage: str, step: int, steps: int, note: str) -> None:
        if stage not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, visible=False)
            self.tasks[stage] = self.progress.add_task(stage, total=steps, note=note)
        self.progress.update(self.tasks[stage], completed=step, total=steps, note=note, visible=True)
