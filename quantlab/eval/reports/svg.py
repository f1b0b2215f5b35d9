"""The little that our plots need of SVG: scales with round ticks, axes, lines, bars and intervals.

A drawing is `WIDTH` units wide and grows with the page. It names classes and no colours: the style sheet has those for
light and dark. Knows nothing about what is plotted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantlab.eval.reports.elements import Markup, element, number

WIDTH, HEIGHT = 400.0, 236.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 20.0, 42.0
Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Scale:
    """From values `low`..`high` to units `start`..`stop`, linear or by decades; values outside stop at the edges."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies, in units of the drawing."""
        low, high, value = (self._flat(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    def _flat(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def across(low: float, high: float, log: bool = False) -> Scale:
    """A horizontal scale over the drawing's inner width."""
    return Scale(low, high, LEFT, WIDTH - RIGHT, log)


def upward(low: float, high: float, height: float = HEIGHT, log: bool = False) -> Scale:
    """A vertical scale over the drawing's inner height, larger values higher up."""
    return Scale(low, high, height - BOTTOM, TOP, log)


def span(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """The range of `values` with a margin of 5 %; it begins at zero with `zero`, and is never empty."""
    low, high = min(values), max(values)
    if zero:
        low = min(low, 0.0)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if zero and low == 0.0 else low - room), high + room


def decades(values: Sequence[float]) -> tuple[float, float]:
    """The range of the positive `values`, widened to a third of a decade or more."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    return low / 1.2, max(high * 1.2, low * 2.0)


def ticks(scale: Scale, most: int) -> list[float]:
    """About `most` round values within the scale; with decades powers of ten, and 2 and 5 times those if few."""
    if scale.log:
        first, last = math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9)
        if last - first >= 2:
            return [10.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / most))]
        fine = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [value for value in fine if scale.low <= value <= scale.high]
    step = _round_step((scale.high - scale.low) / most)
    count = math.floor(scale.high / step + 1e-9)
    return [index * step for index in range(math.ceil(scale.low / step - 1e-9), count + 1)]


def drawing(label: str, height: float, *children: Markup) -> Markup:
    """The `svg` element; `label` says in words what it shows, for those who do not see it."""
    box = f"0 0 {number(WIDTH)} {number(height)}"
    return element("svg", {"viewBox": box, "role": "img", "aria-label": label}, *children)


def horizontal_axis(scale: Scale, title: str, show: Format, height: float = HEIGHT, most: int = 6) -> Markup:
    """Ticks, their values and a title under the drawing."""
    bottom = height - BOTTOM
    parts = []
    for value in ticks(scale, most):
        at = scale(value)
        parts.append(line((at, TOP), (at, bottom), "grid"))
        parts.append(text((min(at, WIDTH - 18), bottom + 15), show(value), "tick", "middle"))  # not over the edge
    parts.append(line((scale.start, bottom), (scale.stop, bottom), "axis"))
    parts.append(text(((scale.start + scale.stop) / 2, height - 8), title, "title", "middle"))
    return group(*parts)


def vertical_axis(scale: Scale, title: str, show: Format, most: int = 5) -> Markup:
    """Ticks and their values at the left, the title above them."""
    parts = []
    for value in ticks(scale, most):
        at = scale(value)
        parts.append(line((LEFT, at), (WIDTH - RIGHT, at), "grid"))
        parts.append(text((LEFT - 6, at + 4), show(value), "tick", "end"))
    parts.append(text((4, 11), title, "title", "start"))
    return group(*parts)


def line(first: Point, second: Point, kind: str) -> Markup:
    """A straight line."""
    return element(
        "line",
        {"class": kind, "x1": float(first[0]), "y1": float(first[1]), "x2": float(second[0]), "y2": float(second[1])},
    )


def path(points: Sequence[Point], kind: str) -> Markup:
    """A line through `points`, in units of the drawing."""
    places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("polyline", {"class": kind, "points": places})


def dot(at: Point, kind: str, radius: float = 3.0, tip: str | None = None) -> Markup:
    """A dot; `tip` is shown while a pointer rests on it."""
    inside = () if tip is None else (element("title", None, tip),)
    return element("circle", {"class": kind, "cx": float(at[0]), "cy": float(at[1]), "r": float(radius)}, *inside)


def box(corner: Point, width: float, height: float, kind: str, tip: str | None = None) -> Markup:
    """A rectangle from its upper left corner."""
    inside = () if tip is None else (element("title", None, tip),)
    x, y = float(corner[0]), float(corner[1])
    size = {"width": float(max(width, 0.0)), "height": float(max(height, 0.0))}
    return element("rect", {"class": kind, "x": x, "y": y, **size}, *inside)


def text(at: Point, words: str, kind: str, anchor: str) -> Markup:
    """Words at a place; `anchor` is start, middle or end."""
    return element("text", {"class": kind, "x": float(at[0]), "y": float(at[1]), "text-anchor": anchor}, words)


def whisker(row: float, scale: Scale, values: tuple[float, float, float], kind: str, tip: str | None = None) -> Markup:
    """An interval at height `row`: (low, middle, high), a bar with ends and a dot."""
    low, middle, high = (scale(value) for value in values)
    ends = [line((at, row - 4), (at, row + 4), kind) for at in (low, high)]
    return group(line((low, row), (high, row), kind), *ends, dot((middle, row), kind, 4.0, tip))


def group(*children: Markup) -> Markup:
    """Several parts as one."""
    return element("g", None, *children)


def plain(value: float) -> str:
    """A tick's value: `0.05`, `1,024`, `1e-06`."""
    size = abs(value)
    if value == 0:
        return "0"
    return f"{value:,.6g}" if 1e-4 <= size < 1e6 else f"{value:.3g}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
