"""Draws microseconds against tokens of the linears' benches, with floor and cuBLAS, as one SVG. Knows no GPU."""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 460, 330, 52, 46, 44, 30
INK, GRID = "#3d4451", "#dfe3e8"
# What a row has, its name, colour and dashes.
LINES = (
    ("cublas", "cuBLAS bf16", "#8a93a3", ""),
    ("us", "quantlab", "#c2410c", ""),
    ("floor", "floor: bytes or arithmetic", "#2563a8", "4 3"),
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: a title, and by name of a field its points (tokens, microseconds), ascending."""

    title: str
    points: dict[str, list[tuple[int, float]]]


def panel(title: str, rows: Iterable[dict[str, Any]], layers: int) -> Panel:
    """Sums over layers by number of tokens, where all `layers` of them were measured."""
    sums: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        sums[row["tokens"]].append(row)
    whole = sorted((tokens, group) for tokens, group in sums.items() if len(group) == layers)
    return Panel(title, {field: [(m, sum(row[field] for row in group)) for m, group in whole] for field, *_ in LINES})


def draw(panels: Sequence[Panel], note: str) -> str:
    """Panels side by side, both axes logarithmic."""
    width = len(panels) * (WIDTH + GAP) - GAP + 16
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 24}" font-family="system-ui, '
             f'sans-serif" font-size="12" fill="{INK}"><rect width="100%" height="100%" fill="#ffffff"/>']  # fmt: skip
    parts += [_drawn(one, i * (WIDTH + GAP)) for i, one in enumerate(panels)]
    parts.append(f'<text x="8" y="{HEIGHT + 16}" font-size="11">{escape(note)}</text></svg>\n')
    return "\n".join(parts)


def _drawn(one: Panel, x0: int) -> str:
    tokens = [m for points in one.points.values() for m, _ in points]
    times = [us for points in one.points.values() for _, us in points]
    low, high = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)))

    def x(m: float) -> float:
        return x0 + LEFT + (WIDTH - LEFT - 8) * _share(m, min(tokens), max(tokens))

    def y(us: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(us, low, high)

    parts = [f'<text x="{x0 + LEFT}" y="18" font-weight="600" font-size="13">{escape(one.title)}</text>']
    for us in _decades(low, high):
        parts.append(f'<path d="M{x(min(tokens)):.1f} {y(us):.1f}H{x(max(tokens)):.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x0 + LEFT - 6}" y="{y(us) + 4:.1f}" text-anchor="end">{us:g}</text>')
    for m in (4**i for i in range(8) if min(tokens) <= 4**i <= max(tokens)):
        parts.append(f'<text x="{x(m):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{m}</text>')
    parts.append(f'<text x="{x0 + WIDTH - 8}" y="{HEIGHT - 10}" text-anchor="end">tokens</text>')
    parts.append(f'<text x="{x0 + 8}" y="{TOP - 10}">us</text>')
    for i, (field, name, colour, dashes) in enumerate(LINES):
        path = "L".join(f"{x(m):.1f} {y(us):.1f}" for m, us in one.points[field])
        style = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"'
        parts.append(f'<path d="M{path}" {style}/>')
        key = TOP + 8 + 17 * i
        parts.append(f'<path d="M{x0 + LEFT + 14} {key}h22" {style}/>')
        parts.append(f'<text x="{x0 + LEFT + 42}" y="{key + 4}">{escape(name)}</text>')
    return "\n".join(parts)


def _share(value: float, low: float, high: float) -> float:
    """Where `value` lies from low, 0, to high, 1, by its logarithm."""
    return math.log(value / low) / math.log(high / low)


def _decades(low: float, high: float) -> list[float]:
    steps = [low * 10**i * step for i in range(round(math.log10(high / low))) for step in (1, 2, 5)]
    return [*steps, high]


def main(words: Sequence[str] | None = None) -> None:
    """Read JSON lines of the benches and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="files of JSON lines that the benches wrote")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(words)
    rows = [json.loads(line) for path in options.rows for line in path.read_text().splitlines()]
    w4a16 = [row for row in rows if row.get("op") == "w4a16" and row["dtype"] == "bf16"]
    panels = [panel("W4A16, bf16 activations: four linears of an 8B model", w4a16, 4)]
    panels += [panel("W8A8 with its quantization", [row for row in rows if row.get("op") == "w8a8"], 4)]
    panels += [panel("INT8 output head, 128256 x 4096", [row for row in rows if row.get("op") == "int8_head"], 1)]
    facts = next(row for row in rows if "gpu" in row)
    note = (
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, {facts['time'][:10]}; both axes logarithmic"
    )
    options.out.write_text(draw([one for one in panels if one.points["us"]], note))


if __name__ == "__main__":
    main()
