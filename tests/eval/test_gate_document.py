"""docs/gate.md says what the code does: its tables, its example, its metrics and the shipped gates."""

import re
from pathlib import Path

import pytest

from quantlab.eval.gate_file import find_gate, parse_gate
from quantlab.eval.metrics import POOLED, TEXT_FIELDS
from quantlab.eval.statistics import items_needed, p_loss_below, smallest_drop


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "gate.md").read_text()


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose header starts with `first`, header included, rule left out."""
    lines = page[page.index(f"| {first} |") :].split("\n\n")[0].split("\n")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_the_tables_of_items_and_drops_are_computed(page: str) -> None:
    header, *margins = rows(page, "margin")
    rates = [0.0, *(float(cell.split()[0]) / 100 for cell in header[2:])]
    for name, *cells in margins:
        margin = float(name.split()[0]) / 100
        assert cells == [f"{items_needed(margin, rate):,}" for rate in rates]
    header, *counts = rows(page, "items")
    rates = [float(cell.split()[0]) / 100 for cell in header[1:]]
    for name, *cells in counts:
        items = int(name.replace(",", ""))
        assert cells == [f"{100 * smallest_drop(items, rate):.2f}" for rate in rates]


def test_the_example_is_a_gate(page: str) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(parse_gate(example, "gate.md", "gate.md").rules) == 5


def test_every_metric_is_named(page: str) -> None:
    for name in (*TEXT_FIELDS, *POOLED, "task.*"):
        assert f"`{name}`" in page, name


def test_the_shipped_gates_are_as_described(page: str) -> None:
    table = rows(page, "| `default`")[1:]
    for column, name in ((1, "default"), (2, "strict")):
        ratio, kl, pooled, guard = find_gate(name).rules
        assert ratio.max is not None
        assert f"{100 * (ratio.max - 1):g} % up" in table[0][column]
        assert f"{kl.max:g} nats" in table[1][column]
        assert f"below {100 * pooled.margin:g} point" in table[2][column]
        assert (f"above {100 * guard.margin:g} points" in table[3][column]) == (guard.margin > 0)


def test_the_normal_approximation_is_as_lax_as_the_page_says(page: str) -> None:
    assert "p = 0.048" in page
    assert p_loss_below(0, 0, 135, 0.02) == pytest.approx(0.98**135, abs=2e-5) == pytest.approx(0.065, abs=5e-4)
