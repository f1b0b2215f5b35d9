"""The plot of the quantizer's own errors: one line for each kind of linear, along the decoder's blocks.

Knows nothing about the page around it.
"""

import re
from collections.abc import Mapping
from statistics import median

from quantlab.eval.reports import svg
from quantlab.eval.reports.elements import Markup
from quantlab.eval.reports.panels import legend, panel
from quantlab.eval.reports.tables import Table
from quantlab.eval.reports.words import one_line, small
from quantlab.eval.result import LayerError

MAX_BLOCKS = 128
MAX_KINDS = 8  # as many as the style sheet tells apart
WORST = 12
BLOCK = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.(.+)$")
NUMBER = re.compile(r"\.\d+(?=\.|$)")
Errors = Mapping[str, Mapping[int, float]]


def layer_plot(layers: tuple[LayerError, ...]) -> Markup | None:
    """The errors of all linears; None when the quantizer left none."""
    if not layers:
        return None
    kinds = errors_by_kind(layers)
    worst = sorted(layers, key=lambda layer: -layer.error)
    name, middle = one_line(worst[0].module, 80), median(layer.error for layer in layers)
    finding = f"Worst: {name} with {small(worst[0].error)}; half of {len(layers):,} are under {small(middle)}."
    rows = tuple((one_line(layer.module, 80), small(layer.error)) for layer in worst[:WORST])
    numbers = Table("The worst linears", ("linear", "error"), rows, 1)
    entries = [(f"kind{index}", name) for index, name in enumerate(_short(list(kinds)))]
    plot = _drawing(f"Errors of linears by block. {finding}", kinds)
    return panel("Output error by linear", finding, legend(*entries), plot, numbers)


def errors_by_kind(layers: tuple[LayerError, ...]) -> Errors:
    """Kind -> block -> the worst error there; the kinds with the largest errors, in the decoder's order.

    Experts of one block are one kind: a line for each would be a grey cloud. What is in no block stands behind them.
    """
    kinds: dict[str, dict[int, float]] = {}
    behind = 1 + max((_place(layer.module)[0] or 0 for layer in layers), default=0)
    for layer in layers:
        block, kind = _place(layer.module)
        errors = kinds.setdefault(kind, {})
        at = behind if block is None else block
        errors[at] = max(layer.error, errors.get(at, layer.error))
    largest = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))[:MAX_KINDS]
    return {kind: kinds[kind] for kind in kinds if kind in largest}


def _short(kinds: list[str]) -> list[str]:
    """The last parts of the names, where they tell them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else kinds


def _place(module: str) -> tuple[int | None, str]:
    match = BLOCK.search(module[:512])
    block, kind = (int(match[1]), match[2]) if match else (None, module)
    return block, one_line(NUMBER.sub(".*", kind), 40)


def _drawing(label: str, kinds: Errors) -> Markup:
    blocks = sorted({block for errors in kinds.values() for block in errors})
    step = -(-len(blocks) // MAX_BLOCKS)
    shown = set(blocks[::step])
    values = [error for errors in kinds.values() for error in errors.values()]
    x = svg.across(blocks[0] - 0.5, blocks[-1] + 0.5)
    y = svg.upward(*svg.decades(values), log=True)
    lines = []
    for index, (kind, errors) in enumerate(kinds.items()):
        places = {block: (x(block), y(errors[block])) for block in sorted(errors) if block in shown}
        lines.append(svg.path(list(places.values()), f"kind{index}"))
        tips = {block: f"block {block}, {kind}: {small(errors[block])}" for block in places}
        lines += [svg.dot(at, f"kind{index} dot", 2.2, tips[block]) for block, at in places.items()]
    axes = (
        svg.horizontal_axis(x, "block", svg.plain),
        svg.vertical_axis(y, "relative error (logarithmic)", svg.plain),
    )
    return svg.drawing(label, svg.HEIGHT, *axes, *lines)
