"""What a run looks like while it works: rows, gains, times, on a terminal and in a log."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from quantlab.cli.progress import LiveView, PlainView, make_view
from quantlab.cli.tracker import Tracker
from quantlab.events import BlockDone, Event, ModuleDone, Notice, RunStarted, StepDone


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def play(send: Callable[[Event], None], clock: Clock, resumed: int = 0) -> None:
    """A run of four blocks and a stage, ten seconds a block."""
    send(RunStarted(blocks=4, resumed=resumed, tokens=65536, stages=("distill", "verify")))
    for block in range(resumed, 4):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            send(ModuleDone(block, f"model.layers.{block}.{name}", "gptq", 0.006, 0.01, 1.0))
        clock.now += 10.0
        send(BlockDone(block, 4, 0.0123, 10.0))
    for step in range(1, 101):
        clock.now += 1.0
        send(StepDone("distill", step, 100, loss=1.0 / step))
    send(Notice("model.layers.1.mlp.up_proj stays at RTN: held-out error was not lower"))


def plain(resumed: int = 0) -> list[str]:
    """The lines of a piped run."""
    stream, clock = io.StringIO(), Clock()
    with PlainView(stream, clock) as view:
        play(view, clock, resumed)
    return stream.getvalue().splitlines()


def test_piped_run_has_one_line_a_block_with_error_gain_time_and_time_left() -> None:
    lines = plain()
    assert lines[0] == "4 blocks on 65.5k tokens, then distill, verify"
    assert lines[1].split() == ["block", "error", "vs", "RTN", "time", "left"]
    rows = [line.split() for line in lines[2:6]]
    assert rows[0] == ["1/4", "1.23e-02", "-40", "%", "10s", "30s"]
    assert rows[3] == ["4/4", "1.23e-02", "-40", "%", "10s", "0.0s"]


def test_piped_stage_is_told_every_ten_seconds_and_at_its_end() -> None:
    stages = [line for line in plain() if line.startswith("distill")]
    assert len(stages) == 11
    assert stages[0].startswith("distill 1/100  loss 1")
    assert stages[-1].startswith("distill 100/100  loss 0.01")


def test_piped_output_has_no_escape_codes() -> None:
    assert all(line.isprintable() for line in plain())
    assert plain()[-1].startswith("note: model.layers.1.mlp.up_proj stays at RTN")


def test_resumed_blocks_are_told_and_do_not_count_towards_the_rate() -> None:
    lines = plain(resumed=2)
    assert lines[0].startswith("4 blocks, 2 of them done before, on") or "2 of them done before" in lines[0]
    assert lines[2].split()[0] == "3/4"
    assert lines[2].split()[-1] == "10s"


def test_terminal_shows_the_rows_and_the_module_at_work() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=100, highlight=False)
    with LiveView(console, clock) as view:
        view(RunStarted(blocks=2, resumed=0, tokens=1024, stages=()))
        view(ModuleDone(0, "model.layers.0.mlp.up_proj", "gptq", 0.5, 1.0, 0.1))
        view.progress.refresh()
        clock.now += 3.0
        view(BlockDone(0, 2, 0.01, 3.0))
        view(ModuleDone(1, "model.layers.1.mlp.up_proj", "rtn", 1.0, 1.0, 0.1))
        view.progress.refresh()
        for step in (1, 2):
            clock.now += 2.0
            view(StepDone("verify", step, 2))
            view.progress.refresh()
    text = stream.getvalue()
    assert "1/2" in text and "-50 %" in text and "1.00e-02" in text
    assert "block 1: up_proj gptq" in text
    assert "block 2: up_proj rtn, 3.0s left" in text
    assert "verify: 2 steps in 2.0s" in text


def test_view_follows_the_stream() -> None:
    assert isinstance(make_view(io.StringIO()), PlainView)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    assert isinstance(make_view(terminal), LiveView)


def test_notice_cannot_move_the_cursor() -> None:
    stream = io.StringIO()
    with PlainView(stream, Clock()) as view:
        view(Notice("bad \x1b[2J name\nsecond"))
    assert stream.getvalue() == "note: bad \\x1b[2J name\\nsecond\n"


def test_gain_is_the_geometric_mean_and_starts_anew_each_block() -> None:
    tracker = Tracker(Clock())
    tracker.add(ModuleDone(0, "a", "gptq", 0.25, 1.0, 0.0))
    tracker.add(ModuleDone(0, "b", "gptq", 1.0, 1.0, 0.0))
    assert tracker.gain() == pytest.approx(0.5)
    assert tracker.gain() is None
    assert tracker.total_gain() == pytest.approx(0.5)
