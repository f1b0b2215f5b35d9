"""Clustered errors by hand, paired tests against enumeration and published examples, power against the tests."""

import math
from itertools import pairwise, product

import pytest

from quantlab.eval.probability import binomial_at_least, binomial_mass
from quantlab.eval.result import Estimate
from quantlab.eval.statistics import (
    clustered_mean,
    difference_interval,
    drop_power,
    holm,
    interval,
    items_needed,
    mcnemar_worse,
    mean_of_clusters,
    p_above,
    p_below,
    p_loss_above,
    p_loss_below,
    paired_difference,
    score,
    smallest_drop,
)


def test_a_clustered_error_is_that_of_the_clusters_sums() -> None:
    estimate = clustered_mean([[1.0, 1.0], [4.0, 4.0], [1.0]])
    mean = 11.0 / 5.0
    deviations = (2.0 - 2 * mean, 8.0 - 2 * mean, 1.0 - mean)
    expected = math.sqrt(1.5 * sum(value * value for value in deviations)) / 5.0
    assert estimate.value == pytest.approx(mean)
    assert estimate.standard_error == pytest.approx(expected)
    assert estimate.clusters == 3


def test_clusters_of_one_item_give_the_usual_error_of_a_mean() -> None:
    values = [0.2, 0.9, 0.4, 1.3]
    estimate = mean_of_clusters(values, [1] * 4)
    variance = sum((value - 0.7) ** 2 for value in values) / 3
    assert estimate.standard_error == pytest.approx(math.sqrt(variance / 4))


def test_items_that_repeat_within_a_cluster_add_no_certainty() -> None:
    once = clustered_mean([[0.0], [1.0], [1.0]])
    tenfold = clustered_mean([[0.0] * 10, [1.0] * 10, [1.0] * 10])
    assert tenfold.standard_error == pytest.approx(once.standard_error)


def test_one_cluster_has_no_error_and_none_has_no_mean() -> None:
    estimate = clustered_mean([[1.0, 2.0], []])
    assert (estimate.value, estimate.standard_error, estimate.clusters) == (1.5, None, 1)
    assert interval(estimate) == (-math.inf, math.inf)
    assert p_above(estimate, 0.0) == p_below(estimate, 9.0) == 1.0
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([])


def test_pairing_removes_what_both_share() -> None:
    baseline, candidate = [10.0, 20.0, 30.0, 40.0], [10.1, 20.2, 30.1, 40.2]
    estimate = paired_difference(baseline, candidate)
    assert estimate.value == pytest.approx(0.15)
    assert estimate.standard_error == pytest.approx(0.05 / math.sqrt(3), rel=1e-6)
    grouped = paired_difference(baseline, candidate, clusters=["a", "a", "b", "b"])
    assert (grouped.clusters, grouped.standard_error) == (2, pytest.approx(0.0, abs=1e-12))
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired_difference([1.0, 2.0], [1.0])


def test_few_clusters_widen_the_interval() -> None:
    wide = interval(Estimate(value=1.0, standard_error=0.1, clusters=3))
    narrow = interval(Estimate(value=1.0, standard_error=0.1))
    assert wide == pytest.approx((1.0 - 0.430265, 1.0 + 0.430265), abs=1e-6)
    assert narrow == pytest.approx((1.0 - 0.195996, 1.0 + 0.195996), abs=1e-6)


def test_p_values_of_a_mean_are_the_interval_read_backwards() -> None:
    estimate = Estimate(value=1.0, standard_error=0.1, clusters=12)
    low, high = interval(estimate, 0.90)
    assert p_above(estimate, low) == pytest.approx(0.05, abs=1e-9)
    assert p_below(estimate, high) == pytest.approx(0.05, abs=1e-9)
    assert p_above(estimate, 1.0) == p_below(estimate, 1.0) == pytest.approx(0.5)
    exact = Estimate(value=1.0, standard_error=0.0, clusters=12)
    assert (p_above(exact, 0.5), p_above(exact, 1.0), p_above(exact, 1.5)) == (0.0, 1.0, 1.0)
    assert (p_below(exact, 0.5), p_below(exact, 1.0), p_below(exact, 1.5)) == (1.0, 1.0, 0.0)


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar_worse(7, 1) == pytest.approx((8 + 1) / 2**8)
    assert mcnemar_worse(1, 7) == pytest.approx(1.0 - 1 / 2**8)
    assert mcnemar_worse(0, 0) == 1.0


def test_the_interval_is_that_of_a_published_example() -> None:
    # Airway hyper-responsiveness before and after transplantation (Bentur et al. 2009), Tango's score interval as in
    # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014): 21 children, 7 and 1 discordant.
    assert difference_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert difference_interval(1, 7, 21) == pytest.approx((0.026, 0.517), abs=5e-4)


def test_the_score_is_mcnemars_at_no_loss_and_turns_with_its_sign() -> None:
    assert score(30, 14, 500, 0.0) == pytest.approx(16 / math.sqrt(44))
    for b, c, loss in product((0, 1, 5, 40), (0, 2, 40), (0.0, 0.01, 0.3)):
        assert score(b, c, 100, loss) == pytest.approx(-score(c, b, 100, -loss), abs=1e-9)


def test_the_interval_of_no_flips_shrinks_with_items() -> None:
    widths = [difference_interval(0, 0, items)[1] for items in (10, 100, 1_000)]
    assert widths[1] == pytest.approx(3.8415 / 103.8415, abs=1e-4)
    assert all(one > other for one, other in pairwise(widths))


def enumerated(b: int, c: int, items: int, margin: float, below: bool) -> float:
    """The unconditional p-value by summing over every table, at the worst of many flip rates."""
    observed = score(b, c, items, margin)
    chosen = [
        (x, y)
        for x in range(items + 1)
        for y in range(items + 1 - x)
        if (score(x, y, items, margin) <= observed + 1e-9 if below else score(x, y, items, margin) >= observed - 1e-9)
    ]
    tables = [(x, y, math.comb(items, x) * math.comb(items - x, y)) for x, y in chosen]
    worst = 0.0
    for step in range(401):
        gained = (1.0 - margin) / 2.0 * step / 400
        lost, same = gained + margin, 1.0 - 2.0 * gained - margin
        worst = max(worst, math.fsum(n * lost**x * gained**y * same ** (items - x - y) for x, y, n in tables))
    return worst


@pytest.mark.parametrize(
    ("b", "c", "items", "margin"),
    [(0, 0, 25, 0.1), (1, 2, 25, 0.1), (4, 1, 25, 0.05), (6, 0, 18, 0.1), (2, 5, 18, 0.2)],
)
def test_exact_p_values_are_those_of_full_enumeration(b: int, c: int, items: int, margin: float) -> None:
    # Berger and Boos look at the flip rates that the data allow, which may be fewer, and add 1e-5.
    for found, everything in (
        (p_loss_below(b, c, items, margin), enumerated(b, c, items, margin, below=True)),
        (p_loss_above(b, c, items, margin), enumerated(b, c, items, margin, below=False)),
    ):
        assert found <= everything + 2e-5
        assert found >= 0.8 * everything


def test_zero_flips_prove_a_margin_only_when_chance_would_have_shown_some() -> None:
    assert p_loss_below(0, 0, 100, 0.02) == pytest.approx(0.98**100, abs=2e-5)
    assert p_loss_below(0, 0, 148, 0.02) > 0.05 > p_loss_below(0, 0, 150, 0.02)


def test_p_values_rise_and_fall_with_the_loss() -> None:
    below = [p_loss_below(b, 20, 1_000, 0.02) for b in range(0, 60, 5)]
    above = [p_loss_above(b, 20, 1_000, 0.02) for b in range(0, 60, 5)]
    assert below == sorted(below)
    assert above == sorted(above, reverse=True)
    assert p_loss_above(30, 20, 1_000, 0.0) == mcnemar_worse(30, 20)


def test_large_counts_agree_with_the_normal_approximation() -> None:
    z = score(900, 820, 15_500, 0.01)
    assert p_loss_below(900, 820, 15_500, 0.01) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2.0)), rel=0.03)


def edge(items: int, rate: float, margin: float, alpha: float) -> dict[int, int]:
    """Number of flips -> the most right-to-wrong ones with which non-inferiority is still shown."""
    spread = 6.5 * math.sqrt(items * rate)
    found, b = {}, -1
    for flips in range(max(0, int(items * rate - spread - 5)), min(items, int(items * rate + spread + 25)) + 1):
        while b < flips and p_loss_below(b + 1, flips - b - 1, items, margin) <= alpha:
            b += 1
        found[flips] = b
    return found


def chance(region: dict[int, int], items: int, rate: float, loss: float) -> float:
    """The probability that non-inferiority is shown, by summing binomial masses."""
    toward_wrong = (rate + loss) / (2.0 * rate)
    total = 0.0
    for flips, most in region.items():
        inside = math.fsum(
            math.comb(flips, b) * toward_wrong**b * (1.0 - toward_wrong) ** (flips - b) for b in range(most + 1)
        )
        weight = math.lgamma(items + 1) - math.lgamma(flips + 1) - math.lgamma(items - flips + 1)
        total += math.exp(weight + flips * math.log(rate) + (items - flips) * math.log1p(-rate)) * inside
    return total


@pytest.mark.parametrize(
    ("margin", "rate"),
    [(0.02, 0.001), (0.02, 0.005), (0.02, 0.01), (0.02, 0.05), (0.05, 0.01), (0.05, 0.1), (0.01, 0.002)],
)
def test_the_items_called_sufficient_are_and_no_loss_at_the_margin_slips_through(margin: float, rate: float) -> None:
    items = items_needed(margin, rate)
    assert chance(edge(items, rate, margin, 0.05), items, rate, loss=0.0) >= 0.8
    at_margin = max(rate, margin)
    assert chance(edge(items, at_margin, margin, 0.05), items, at_margin, loss=margin) <= 0.05


def test_the_items_needed_are_those_of_the_usual_formula_where_flips_are_many() -> None:
    # (z_alpha + z_power)^2 x flip rate / margin^2
    for margin, rate in ((0.01, 0.05), (0.01, 0.15), (0.005, 0.02)):
        assert items_needed(margin, rate) == pytest.approx(6.1826 * rate / margin**2, rel=0.08)


@pytest.mark.parametrize(("items", "rate"), [(60, 0.0), (100, 0.1), (1_000, 0.02), (5_000, 0.12)])
def test_the_smallest_drop_is_found_four_times_in_five(items: int, rate: float) -> None:
    drop = smallest_drop(items, rate)
    assert 0.8 <= drop_power(items, rate, drop, 0.05) <= 0.81
    assert drop_power(items, rate, drop * 0.9, 0.05) < 0.8
    assert smallest_drop(items, rate, margin=0.02) > drop


@pytest.mark.parametrize(("items", "rate", "margin"), [(60, 0.1, 0.05), (200, 0.02, 0.05), (150, 0.1, 0.02)])
def test_the_smallest_drop_beyond_a_margin_is_found_by_the_exact_test(items: int, rate: float, margin: float) -> None:
    drop = smallest_drop(items, rate, alpha=0.01, margin=margin)
    flip_rate = max(rate, drop)
    toward_wrong = (flip_rate + drop) / (2.0 * flip_rate)
    shown, least = 0.0, 0  # the fewest right-to-wrong flips that show the loss: never fewer when there is a flip more
    for flips in range(int(items * flip_rate + 8.0 * math.sqrt(items * flip_rate))):
        while least <= flips and p_loss_above(least, flips - least, items, margin) > 0.01:
            least += 1
        shown += binomial_mass(flips, items, flip_rate) * binomial_at_least(least, flips, toward_wrong)
    assert 0.8 <= shown < 1.0


def test_items_that_can_show_nothing_say_so() -> None:
    assert smallest_drop(4, 0.0) == 1.0  # four flips of four have p = 1/16
    assert smallest_drop(5, 0.0) < 1.0
