"""Scales, ticks and marks: where values land, at any size of number."""

import math

import pytest

from quantlab.eval.reports import svg


def test_linear_and_logarithmic_scales_map_their_ends_and_middle() -> None:
    scale = svg.Scale(10.0, 20.0, 100.0, 300.0)
    assert [scale(v) for v in (10.0, 15.0, 20.0)] == [100.0, 200.0, 300.0]
    log = svg.Scale(1e-4, 1.0, 0.0, 400.0, log=True)
    assert [log(v) for v in (1e-4, 1e-2, 1.0)] == pytest.approx([0.0, 200.0, 400.0])


def test_values_outside_stop_at_the_edges() -> None:
    scale = svg.upward(0.0, 1.0)
    assert scale(-5.0) == scale(0.0) > scale(1.0) == scale(7.0)
    assert svg.across(1e-3, 1.0, log=True)(0.0) == svg.LEFT


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (23.0, 51.0, [30, 40, 50]),
        (-0.11, 0.04, [-0.1, -0.05, 0.0]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, values: list[float]) -> None:
    assert svg.ticks(svg.Scale(low, high, 0.0, 1.0), 5) == pytest.approx(values)


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [(1e-6, 10.0, [1e-6, 1e-4, 1e-2, 1.0]), (0.002, 0.03, [0.002, 0.005, 0.01, 0.02]), (0.5, 60.0, [1, 10])],
)
def test_ticks_of_decades(low: float, high: float, values: list[float]) -> None:
    found = svg.ticks(svg.Scale(low, high, 0.0, 1.0, log=True), 5)
    assert all(low <= value <= high * (1 + 1e-9) for value in found)
    assert set(map("{:.6g}".format, values)) <= set(map("{:.6g}".format, found))


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [1.0, math.nextafter(1.0, 2.0)], [-1e300, 1e300], [1e300], [1e-300, 2e-300], [-3.0]]
)
def test_any_numbers_make_a_scale_with_a_few_ticks(values: list[float]) -> None:
    for low, high in (svg.span(values), svg.span(values, zero=True)):
        scale = svg.upward(low, high)
        assert low < high and len(svg.ticks(scale, 5)) <= 12
        assert all(math.isfinite(scale(value)) for value in values)
    low, high = svg.decades(values)
    assert 0 < low < high and len(svg.ticks(svg.upward(low, high, log=True), 5)) <= 12


def test_words_in_a_drawing_are_escaped() -> None:
    made = svg.drawing('a "b" <c>', 10.0, svg.text((0.0, 0.0), "<d>", "tick", "start"), svg.dot((1, 2), "x", 3, "<e>"))
    assert "<c>" not in made and "<d>" not in made and "<e>" not in made and "&lt;e&gt;" in made
