"""The plot of the tasks: each difference with its interval, against zero and the noise floor.

Knows nothing about the page around it.
"""

from quantlab.eval.reports import svg
from quantlab.eval.reports.elements import Markup
from quantlab.eval.reports.panels import legend, panel
from quantlab.eval.reports.tables import pooled
from quantlab.eval.reports.words import one_line, points
from quantlab.eval.result import Report, TaskNoise, TaskResult

MAX_TASKS = 60
ROW = 24.0
NAMES = 132.0
MAX_NAME = 20
LOST, WON, EVEN = "lost", "won", "even"


def task_plot(report: Report) -> Markup | None:
    """The differences of all tasks, the worst first; None without tasks."""
    tasks = sorted(report.tasks, key=lambda task: task.difference.value)[:MAX_TASKS]
    if not tasks:
        return None
    floors = {noise.name: noise.flips / noise.items for noise in _noises(report) if noise.items}
    height = svg.TOP + ROW * len(tasks) + svg.BOTTOM
    reach = [share for task in tasks for share in (task.low, task.high)] + [0.0]
    low, high = svg.span([100 * share for share in reach])
    x = svg.Scale(low, high, NAMES, svg.WIDTH - svg.RIGHT)
    rows = [_row(task, svg.TOP + ROW * (index + 0.5), x, floors.get(task.name)) for index, task in enumerate(tasks)]
    zero = svg.line((x(0.0), svg.TOP), (x(0.0), height - svg.BOTTOM), "zero")
    axis = svg.horizontal_axis(x, "candidate minus baseline, percentage points", svg.plain, height)
    finding = _finding(report.tasks)
    plot = svg.drawing(f"Differences of the tasks. {finding}", height, axis, *rows[::-1], zero)
    return panel("Difference by task", finding, _legend(tasks, bool(floors)), plot)


def direction(task: TaskResult) -> str:
    """Whether the interval lies below zero, above it, or holds it."""
    return LOST if task.high < 0 else WON if task.low > 0 else EVEN


def _noises(report: Report) -> tuple[TaskNoise, ...]:
    return report.noise.tasks if report.noise else ()


def _row(task: TaskResult, row: float, x: svg.Scale, floor: float | None) -> Markup:
    name = one_line(task.name)
    short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    parts = [svg.text((4, row + 4), short, "tick", "start")]
    if floor is not None:
        left, right = x(-100 * floor), x(100 * floor)
        parts.append(svg.box((left, row - ROW / 2 + 2), right - left, ROW - 4, "bar-noise"))
    low, middle, high = (100 * share for share in (task.low, task.difference.value, task.high))
    tip = f"{name}: {points(task.difference.value)} ({points(task.low)} to {points(task.high)}), {task.items:,} items"
    return svg.group(*parts, svg.whisker(row, x, (low, middle, high), direction(task), tip))


def _finding(tasks: tuple[TaskResult, ...]) -> str:
    """What can be said of all tasks in one sentence."""
    found = [direction(task) for task in tasks]
    return (
        f"{found.count(LOST)} of {len(tasks)} worse and {found.count(WON)} better beyond their 95 % intervals; "
        f"{points(pooled(tasks)[1], 2)} points over all items."
    )


def _legend(tasks: list[TaskResult], noise: bool) -> Markup:
    names = {LOST: "worse", EVEN: "cannot tell", WON: "better"}
    present = {direction(task) for task in tasks}
    entries = [(kind, name) for kind, name in names.items() if kind in present]
    return legend(*entries, *([("bar-noise", "noise floor")] if noise else []))
