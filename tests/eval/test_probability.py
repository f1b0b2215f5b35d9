"""Tails and quantiles against tables, closed forms and plain sums."""

import math

import pytest

from quantlab.eval.probability import (
    beta_share,
    binomial_at_least,
    binomial_at_most,
    binomial_mass,
    normal_quantile,
    share_bounds,
    student_quantile,
    student_tail,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [
        (0.95, 1, 6.313752),
        (0.975, 1, 12.706205),
        (0.95, 2, 2.919986),
        (0.975, 5, 2.570582),
        (0.95, 30, 1.697261),
        (0.995, 120, 2.617421),
        (0.05, 30, -1.697261),
    ],
)
def test_student_quantiles_are_those_of_the_tables(probability: float, degrees: int, quantile: float) -> None:
    assert student_quantile(probability, degrees) == pytest.approx(quantile, abs=2e-6)
    assert student_tail(quantile, degrees) == pytest.approx(1.0 - probability, abs=1e-6)


@pytest.mark.parametrize("t", [-8.0, -1.3, 0.0, 0.4, 2.5, 40.0])
def test_student_tails_have_closed_forms_at_one_and_two_degrees(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-14)
    assert student_tail(t, 2) == pytest.approx(0.5 - t / (2.0 * math.sqrt(2.0 + t * t)), abs=1e-14)


def test_many_degrees_of_freedom_are_the_normal() -> None:
    assert student_quantile(0.95, 10**9) == pytest.approx(normal_quantile(0.95), abs=1e-9)
    assert student_tail(1.5, 10_000) == pytest.approx(student_tail(1.5, 10_001), rel=3e-4)


@pytest.mark.parametrize(("trials", "probability"), [(1, 0.3), (12, 0.5), (40, 0.02), (500, 0.97), (3_000, 0.1)])
def test_binomial_tails_are_sums_of_masses(trials: int, probability: float) -> None:
    exact = [
        math.exp(
            math.log(math.comb(trials, k)) + k * math.log(probability) + (trials - k) * math.log(1.0 - probability)
        )
        for k in range(trials + 1)
    ]
    for count in {0, 1, trials // 10, trials // 2, int(trials * probability), trials - 1, trials}:
        assert binomial_mass(count, trials, probability) == pytest.approx(exact[count], rel=1e-9)
        assert binomial_at_most(count, trials, probability) == pytest.approx(math.fsum(exact[: count + 1]), rel=1e-9)
        assert binomial_at_least(count, trials, probability) == pytest.approx(math.fsum(exact[count:]), rel=1e-9)


def test_certain_and_impossible_counts() -> None:
    assert binomial_at_least(0, 0, 0.5) == 1.0
    assert binomial_at_least(4, 3, 0.5) == 0.0
    assert binomial_at_most(-1, 3, 0.5) == 0.0
    assert binomial_at_most(3, 3, 1.0) == 1.0
    assert [binomial_mass(k, 2, 1.0) for k in range(3)] == [0.0, 0.0, 1.0]
    assert [binomial_mass(k, 2, 0.0) for k in range(3)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("count", "trials"), [(0, 20), (3, 20), (10, 20), (20, 20), (17, 5_000)])
def test_each_bound_of_a_share_is_wrong_as_often_as_it_says(count: int, trials: int) -> None:
    low, high = share_bounds(count, trials, 0.05)
    assert low <= count / trials <= high
    if count:
        assert binomial_at_least(count, trials, low) == pytest.approx(0.05, rel=1e-9)
    if count < trials:
        assert binomial_at_most(count, trials, high) == pytest.approx(0.05, rel=1e-9)


def test_the_beta_function_is_symmetric() -> None:
    for x, a, b in ((0.2, 3.0, 0.5), (0.7, 40.0, 90.0), (1e-4, 0.5, 2.0)):
        assert beta_share(x, a, b) == pytest.approx(1.0 - beta_share(1.0 - x, b, a), rel=1e-9)
