"""The plots of a load test: figures against load, distributions, and each level's time from beginning to end.

Knows nothing about the page around them.
"""

from collections.abc import Callable, Sequence

from quantlab.bench.serve_result import LoadResult
from quantlab.bench.serve_summary import LevelResult, Spread
from quantlab.bench.serve_table import rate, seconds
from quantlab.eval.reports import svg
from quantlab.eval.reports.elements import Markup
from quantlab.eval.reports.panels import legend, panel
from quantlab.eval.reports.words import percent

KINDS = 8  # distinct lines that the style sheet has
MAX_DOTS = 600
Line = tuple[str, str, Sequence[svg.Point]]  # kind, name, points in the plot's own units
Format = Callable[[float], str]


def load_plots(result: LoadResult) -> list[Markup]:
    """Throughput and latencies against the load, of two levels or more."""
    levels = sorted(result.levels, key=lambda level: level.value)
    if len(levels) < 2:
        return []
    best = max(levels, key=lambda level: level.output_rate)
    plots = [
        _against_load(
            levels,
            (
                "Throughput",
                f"Most with {best.name}: {rate(best.output_rate)} output tokens a second.",
                "tokens a second",
            ),
            [("kind0", "output tokens", lambda level: level.output_rate)],
            svg.plain,
        )
    ]
    for title, of in (("Time to first token", _ttft), ("Time between tokens", _itl)):
        first, last = of(levels[0]), of(levels[-1])
        finding = f"Median {seconds(first.p50)} with {levels[0].name}, {seconds(last.p50)} with {levels[-1].name}."
        shares = [("kind0", "median", lambda level, of=of: of(level).p50)]
        shares += [("kind1", "99 %", lambda level, of=of: of(level).p99)]
        plots.append(_against_load(levels, (title, finding, "time"), shares, seconds))
    return plots


def distribution_plots(result: LoadResult) -> list[Markup]:
    """How TTFT, the time between tokens and whole answers are distributed, a line for each level."""
    found = [("Time to first token", _ttft), ("Time between tokens", _itl), ("Whole answer", _e2e)]
    plots = [_cumulative(result.levels[:KINDS], title, of) for title, of in found]
    return [plot for plot in plots if plot is not None]


def time_plots(level: LevelResult) -> list[Markup]:
    """A level from its beginning to its end: text, requests, the first tokens, and what the server said of itself."""
    pieces = [(moment.at, moment.pieces) for moment in level.timeline]
    peak = max(value for _, value in pieces)
    plots = [
        _over_time(
            level,
            ("Text", f"{rate(level.output_rate)} tokens a second on average.", "pieces a second"),
            [("kind0", "pieces of text that arrived", pieces)],
        ),
        _requests(level),
    ]
    if level.requests:
        plots.append(_first_tokens(level))
    if any(sample.kv_usage for sample in level.server):
        usage = [(sample.at, 100 * sample.kv_usage) for sample in level.server]
        told = ("KV cache", f"At most {max(value for _, value in usage):.0f} % in use.", "percent")
        plots.append(_over_time(level, told, [("kind2", "in use", usage)]))
    return plots if peak else plots[1:]


def _requests(level: LevelResult) -> Markup:
    lines: list[Line] = [("kind0", "under way", [(moment.at, moment.under_way) for moment in level.timeline])]
    finding = f"At most {max(moment.under_way for moment in level.timeline):.0f} under way at once."
    if level.server:
        lines.append(("kind2", "running, says the server", [(s.at, s.running) for s in level.server]))
        lines.append(("kind1", "waiting, says the server", [(s.at, s.waiting) for s in level.server]))
        finding += f" The server had at most {max(s.waiting for s in level.server):.0f} waiting."
    return _over_time(level, ("Requests", finding, "requests"), lines)


def _first_tokens(level: LevelResult) -> Markup:
    """A dot for each answer: drift over time is a queue that grows."""
    step = -(-len(level.requests) // MAX_DOTS) or 1
    points = [(row[0], row[1]) for row in level.requests[::step]]
    x, y = svg.across(0.0, level.seconds), svg.upward(*svg.span([value for _, value in points], zero=True))
    dots = [svg.dot((x(at), y(value)), "kind0", 2.0) for at, value in points]
    finding = f"Median {seconds(level.ttft.p50)}, 99 % under {seconds(level.ttft.p99)}."
    plot = svg.drawing(f"Time to first token over time. {finding}", svg.HEIGHT, *_axes(x, y, "time", seconds), *dots)
    return panel("First tokens", finding, legend(("kind0", "an answer, at the time it was asked")), plot)


def _over_time(level: LevelResult, told: tuple[str, str, str], lines: Sequence[Line]) -> Markup:
    title, finding, unit = told
    values = [value for _, _, points in lines for _, value in points]
    x, y = svg.across(0.0, level.seconds), svg.upward(*svg.span(values, zero=True))
    drawn = [svg.path([(x(at), y(value)) for at, value in points], kind) for kind, _, points in lines]
    plot = svg.drawing(f"{title} over time. {finding}", svg.HEIGHT, *_axes(x, y, unit), *drawn)
    return panel(title, finding, legend(*((kind, name) for kind, name, _ in lines)), plot)


def _axes(x: svg.Scale, y: svg.Scale, unit: str, show: Format = svg.plain) -> tuple[Markup, Markup]:
    return svg.horizontal_axis(x, "seconds since the beginning", svg.plain), svg.vertical_axis(y, unit, show)


def _against_load(
    levels: Sequence[LevelResult],
    told: tuple[str, str, str],
    lines: Sequence[tuple[str, str, Callable[[LevelResult], float]]],
    show: Format,
) -> Markup:
    """Lines over the load; decades where it grows more than fourfold, or where values do."""
    title, finding, unit = told
    places = [level.value for level in levels]
    values = [of(level) for _, _, of in lines for level in levels]
    x = _scale(places, svg.across)
    y = _scale(values, svg.upward)
    drawn = []
    for kind, name, of in lines:
        points = [(x(level.value), y(of(level))) for level in levels]
        tips = [f"{level.name}: {name} {show(of(level))}" for level in levels]
        drawn.append(svg.path(points, kind))
        drawn += [svg.dot(at, f"{kind} dot", 3.0, tip) for at, tip in zip(points, tips, strict=True)]
    axis = "requests at once" if levels[0].concurrency is not None else "requests a second"
    below = svg.horizontal_axis(x, axis + (" (logarithmic)" if x.log else ""), svg.plain)
    above = svg.vertical_axis(y, unit + (" (logarithmic)" if y.log else ""), show)
    plot = svg.drawing(f"{title} against load. {finding}", svg.HEIGHT, below, above, *drawn)
    return panel(title, finding, legend(*((kind, name) for kind, name, _ in lines)), plot)


def _scale(values: Sequence[float], make: Callable[..., svg.Scale]) -> svg.Scale:
    positive = [value for value in values if value > 0]
    if len(positive) == len(values) and max(values) > 4 * min(values):
        return make(*svg.decades(values), log=True)
    return make(*svg.span(values, zero=True))


def _cumulative(levels: Sequence[LevelResult], title: str, of: Callable[[LevelResult], Spread]) -> Markup | None:
    """The share of measurements that took at most so long."""
    measured = [(index, level, of(level)) for index, level in enumerate(levels) if of(level).count]
    if not measured:
        return None
    floor = 1e-6  # pieces that arrive together are no time apart, which has no place on a log scale
    values = [max(value, floor) for _, _, spread in measured for value in (spread.curve[2], spread.maximum)]
    x, y = svg.across(*svg.decades(values), log=True), svg.upward(0.0, 1.0)
    lines = [
        svg.path([(x(max(value, floor)), y(i / (len(spread.curve) - 1))) for i, value in enumerate(spread.curve)], kind)
        for kind, spread in ((f"kind{index}", spread) for index, _, spread in measured)
    ]
    last = measured[-1]
    finding = f"{last[1].name}: half under {seconds(last[2].p50)}, 99 % under {seconds(last[2].p99)}."
    axis = svg.horizontal_axis(x, "at most (logarithmic)", seconds, most=4)
    shares = svg.vertical_axis(y, "share", lambda share: percent(share, 0))
    plot = svg.drawing(f"{title}, cumulative. {finding}", svg.HEIGHT, axis, shares, *lines)
    return panel(title, finding, legend(*((f"kind{i}", level.name) for i, level, _ in measured)), plot)


def _ttft(level: LevelResult) -> Spread:
    return level.ttft


def _itl(level: LevelResult) -> Spread:
    return level.itl


def _e2e(level: LevelResult) -> Spread:
    return level.e2e
