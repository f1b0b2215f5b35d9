"""The page and the tables of a load test: every figure, drawn and told, and nothing that a server says can harm."""

import dataclasses

import pytest

from quantlab.bench.serve_load import Loaded
from quantlab.bench.serve_options import Level, Limits, LoadOptions, Target
from quantlab.bench.serve_page import load_page
from quantlab.bench.serve_prompts import Rate
from quantlab.bench.serve_result import LoadResult, Server
from quantlab.bench.serve_summary import summarize
from quantlab.bench.serve_table import failure_table, load_table, rate, seconds
from quantlab.bench.serve_watch import Sample
from tests.bench.test_serve_summary import answer, failed
from tests.eval.reports.page import Page

NONE = Limits()
ATTACK = "<script>alert(1)</script>\x1b[2J\u202e"


def result(levels: int = 3, limits: Limits = NONE, name: str = "model") -> LoadResult:
    """A test of several closed loops, each twice as slow as the one before, with a failure."""
    asked = tuple(Level(concurrency=4**index) for index in range(levels))
    found = []
    for index, level in enumerate(asked):
        outcomes = [answer(0.1 * step, 0.2 * 2**index, [0.01 * 2**index] * 9) for step in range(30)]
        samples = [Sample(0.5 * step, 1.0, 2.0, 0.4) for step in range(4)]
        found.append(summarize(level, Loaded([*outcomes, failed(name)], 0.0, 5.0), limits, samples))
    options = LoadOptions(Target("http://127.0.0.1:8000/v1"), asked, limits=limits)
    return LoadResult(options, Server(name, {}, "1.0"), Rate(3.0, 1.4, True), tuple(found), "2026-01-02 03:04:05 UTC")


def test_the_page_shows_every_part() -> None:
    page = Page(load_page(result(limits=Limits(ttft=0.5))))
    titles = [each.text for each in page.all("h2")]
    assert titles[:5] == ["With 1 concurrent", "Every load", "Failures", "Against load", "Distributions"]
    assert titles[5:] == [f"{n} concurrent, over time" for n in (1, 4, 16)] + ["Lengths", "How it was measured"]
    assert len(page.all("figure")) == 3 + 3 + 3 * 4
    labels = [each.attributes["aria-label"] for each in page.all("svg") if each.attributes.get("role") == "img"]
    assert len(labels) == 18 and all(label and len(label) > 20 for label in labels)
    assert [each.text for each in page.all("h1")] == ["60 tokens a second"]
    assert len({each.attributes["id"] for each in page.elements if "id" in each.attributes}) == len(titles)


def test_one_level_has_nothing_to_draw_against() -> None:
    titles = [each.text for each in Page(load_page(result(levels=1))).all("h2")]
    assert "Against load" not in titles and "Distributions" in titles


def test_what_a_server_says_is_shown_harmless() -> None:
    page = Page(load_page(result(name=ATTACK)))
    assert not page.all("script")
    text = "".join(each.text for each in page.elements)
    assert "<script>" in text and "\x1b" not in text and "\u202e" not in text


def test_a_level_without_a_success_is_drawn_too() -> None:
    good = result(levels=1)
    lost = summarize(Level(concurrency=2), Loaded([failed("timed out")] * 3, 0.0, 5.0), Limits())
    page = Page(load_page(dataclasses.replace(good, levels=(*good.levels, lost))))
    assert "2 concurrent, over time" in [each.text for each in page.all("h2")]


def test_the_table_has_a_row_a_level_and_says_what_its_figures_mean() -> None:
    table = load_table(result(limits=Limits(ttft=0.5)))
    assert [row[0] for row in table.rows] == ["1 concurrent", "4 concurrent", "16 concurrent"]
    assert table.rows[0][1:6] == ("30 of 31", "6", "60", "660", "200 ms")
    assert [row[-2] for row in table.rows] == ["96.8 %", "96.8 %", "0.0 %"]
    assert "p99 is close to the largest" in table.note
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_notes_tell_of_what_is_not_to_be_trusted() -> None:
    found = result(levels=1)
    (level,) = found.levels
    late = dataclasses.replace(found, levels=(dataclasses.replace(level, late=0.2, counted_by_server=False),))
    note = load_table(late).note
    assert "client itself fell behind" in note and "gives no usage" in note


def test_failures_have_a_table_of_their_own() -> None:
    table = failure_table(result(levels=2))
    assert table is not None and [row[2] for row in table.rows] == ["1", "1"]
    found = result(levels=1)
    clean = dataclasses.replace(found, levels=(dataclasses.replace(found.levels[0], failures={}),))
    assert failure_table(clean) is None


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0"), (2e-6, "2 us"), (0.0123, "12.3 ms"), (0.9994, "999 ms"), (1.27, "1.27 s"), (1234.0, "1,234 s")],
)
def test_times_are_told_in_three_digits(value: float, told: str) -> None:
    assert seconds(value) == told


def test_rates_are_told_in_three_digits() -> None:
    assert [rate(value) for value in (0.4, 31.72, 1284.2)] == ["0.4", "31.7", "1,284"]
