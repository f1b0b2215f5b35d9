"""The plots of one text: perplexity and KL divergence by position in the window, and how KL is distributed.

Knows nothing about the page around them.
"""

from collections.abc import Callable, Sequence

from quantlab.eval.reports import svg
from quantlab.eval.reports.elements import Markup
from quantlab.eval.reports.panels import legend, panel
from quantlab.eval.reports.tables import Table
from quantlab.eval.reports.words import exp, percent, perplexity, small
from quantlab.eval.result import Position, TextNoise, TextResult

MAX_POINTS = 128
MAX_NUMBERS = 32
SPREAD = 4  # values or widths that differ by more are shown by decades
Bin = tuple[float, float, int]


def text_plots(text: TextResult, noise: TextNoise | None) -> list[Markup]:
    """Every plot that `text` has the data for."""
    slices = thinned(text.positions, MAX_POINTS)
    plots = [_perplexity(slices), _divergence(slices, noise)] if slices else []
    bins = histogram_bins(text)
    return [*plots, _histogram(text, bins)] if bins else plots


def thinned(positions: Sequence[Position], most: int) -> list[Position]:
    """At most `most` of the slices, evenly spread."""
    return list(positions[:: -(-len(positions) // most) or 1])


def histogram_bins(text: TextResult) -> list[Bin]:
    """(low, high, count) of the bins from the first to the last with a token; at most MAX_POINTS of them."""
    edges, counts = text.kl_histogram.edges, text.kl_histogram.counts
    bins = [each for each in zip(edges, edges[1:], counts, strict=False) if each[0] < each[1] and each[1] > 0]
    filled = [index for index, (_, _, count) in enumerate(bins) if count]
    return bins[filled[0] : filled[-1] + 1][:MAX_POINTS] if filled else []


def _perplexity(slices: list[Position]) -> Markup:
    before, after = [exp(s.baseline_nll) for s in slices], [exp(s.candidate_nll) for s in slices]
    ratios = [s.candidate_nll - s.baseline_nll for s in slices]
    finding = f"Candidate over baseline: {_early_and_late(slices, ratios, lambda mean: f'{exp(mean):.4f}')}."
    x = _along(slices)
    wide = max(*before, *after) > SPREAD * min(*before, *after) > 0
    y = svg.upward(*(svg.decades if wide else svg.span)([*before, *after]), log=wide)
    plot = svg.drawing(
        f"Perplexity of both models by position. {finding}",
        svg.HEIGHT,
        *_axes(x, y, "perplexity"),
        _steps(slices, before, (x, y), "baseline"),
        _steps(slices, after, (x, y), "candidate"),
    )
    cells = zip(slices, before, after, ratios, strict=True)
    rows = tuple((_place(s), perplexity(b), perplexity(a), f"{exp(ratio):.4f}") for s, b, a, ratio in cells)
    numbers = Table("Perplexity by position", ("tokens", "baseline", "candidate", "ratio"), rows, 3).first(MAX_NUMBERS)
    lines = legend(("baseline", "baseline"), ("candidate", "candidate"))
    return panel("Perplexity by position", finding, lines, plot, numbers)


def _divergence(slices: list[Position], noise: TextNoise | None) -> Markup:
    values = [s.kl for s in slices]
    finding = f"Mean of the window's tokens: {_early_and_late(slices, values, lambda mean: f'{small(mean)} nats')}."
    entries, floor = [("candidate", "KL(baseline || candidate)")], []
    x, y = _along(slices), svg.upward(*svg.span(values, zero=True))
    if noise is not None:
        entries.append(("floor", f"noise floor, {small(noise.kl)}"))
        floor = [svg.line((x.start, y(noise.kl)), (x.stop, y(noise.kl)), "floor")]
    label = f"KL divergence by position. {finding}"
    line = _steps(slices, values, (x, y), "candidate")
    plot = svg.drawing(label, svg.HEIGHT, *_axes(x, y, "nats a token"), *floor, line)
    rows = tuple((_place(s), small(s.kl)) for s in slices)
    numbers = Table("KL divergence by position", ("tokens", "nats"), rows, 1).first(MAX_NUMBERS)
    return panel("KL divergence by position", finding, legend(*entries), plot, numbers)


def _early_and_late(slices: list[Position], values: Sequence[float], show: Callable[[float], str]) -> str:
    """The mean over the first sixteenth of the window and over the rest; single slices are too noisy to speak of."""
    border = max(s.stop for s in slices) / 16
    parts: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for s, value in zip(slices, values, strict=True):
        parts[s.stop <= border].append((value, max(s.stop - s.start, 1)))
    early, late = (
        show(sum(value * width for value, width in part) / sum(width for _, width in part)) if part else ""
        for part in (parts[True], parts[False])
    )
    first = max((s.stop for s in slices if s.stop <= border), default=0)
    return f"{early} in the first {first:,}, {late} after them" if early and late else early or late


def _histogram(text: TextResult, bins: list[Bin]) -> Markup:
    kl, total = text.kl, sum(count for _, _, count in bins)
    finding = (
        f"Half of the tokens lie under {small(kl.median)} nats, one in a hundred over {small(kl.p99)}, "
        f"one in a thousand over {small(kl.p999)}; the worst has {small(kl.maximum)}."
    )
    first = bins[0][0] if bins[0][0] > 0 else bins[0][1] / 2  # a bin that begins at zero has no place on a log scale
    x = svg.across(first, bins[-1][1], log=True)
    y = svg.upward(0.0, 1.08 * max(count for _, _, count in bins) / total)
    bars = [_bar(each, total, x, y) for each in bins]
    marks = [("median", kl.median), ("mean", kl.mean.value), ("99 %", kl.p99), ("99.9 %", kl.p999)]
    lines = [svg.line((x(at), svg.TOP), (x(at), y.start), f"mark{i}") for i, (_, at) in enumerate(marks)]
    plot = svg.drawing(
        f"Histogram of KL divergence on a logarithmic scale. {finding}",
        svg.HEIGHT,
        svg.horizontal_axis(x, "KL divergence of a token, nats (logarithmic)", svg.plain),
        svg.vertical_axis(y, "share of tokens", lambda share: percent(share, 0 if y.high > 0.04 else 1)),
        *bars,
        *lines,
    )
    rows = tuple((f"{small(low)} to {small(high)}", f"{count:,}") for low, high, count in bins)
    numbers = Table("KL divergence of tokens", ("nats", "tokens"), rows, 1).first(2 * MAX_NUMBERS)
    entries = [(f"mark{i}", f"{name} {small(at)}") for i, (name, at) in enumerate(marks)]
    return panel("Distribution of KL divergence", finding, legend(*entries), plot, numbers)


def _bar(each: Bin, total: int, x: svg.Scale, y: svg.Scale) -> Markup:
    low, high, count = each
    left, right, top = x(low), x(high), y(count / total)
    tip = f"{small(low)} to {small(high)} nats: {count:,} tokens"
    return svg.box((left + 0.4, top), right - left - 0.8, y.start - top, "bar", tip)


def _along(slices: list[Position]) -> svg.Scale:
    """Positions counted from 1; by decades when later slices are much wider than the first ones."""
    first, last = slices[0].start + 1, max(s.stop for s in slices) + 1
    widths = [max(s.stop - s.start, 1) for s in slices]
    last = last if last > first * (1 + 1e-9) else 2 * first  # whatever a result file says
    return svg.across(first, last, log=max(widths) > SPREAD * min(widths))


def _axes(x: svg.Scale, y: svg.Scale, title: str) -> tuple[Markup, Markup]:
    below = svg.horizontal_axis(x, f"token of the window{_kind(x)}", svg.plain)
    return below, svg.vertical_axis(y, f"{title}{_kind(y)}", svg.plain)


def _kind(scale: svg.Scale) -> str:
    return " (logarithmic)" if scale.log else ""


def _steps(slices: list[Position], values: Sequence[float], scales: tuple[svg.Scale, svg.Scale], kind: str) -> Markup:
    """A level for each slice, as wide as it is: a mean over tokens, no point."""
    x, y = scales
    corners = [(x(at), y(value)) for s, value in zip(slices, values, strict=True) for at in (s.start + 1, s.stop + 1)]
    return svg.path(corners, kind)


def _place(part: Position) -> str:
    """The slice's tokens, counted from 1."""
    return f"{part.start + 1:,} to {part.stop:,}" if part.stop > part.start + 1 else f"{part.start + 1:,}"
