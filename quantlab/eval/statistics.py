"""Means with honest errors, what they exceed, and corrections for looking at many of them.

Standard errors are clustered: tokens of one window err together, so the window is the unit (Liang and Zeger 1986;
Miller 2024, arXiv 2411.00640). Two models' answers to the same items, each right or wrong, differ only by flips: b
items that the baseline alone has right, c that the candidate alone has right, out of n; the loss is (b - c) / n.
Knows nothing about tasks, texts or gates.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache

from quantlab.eval.probability import (
    binomial_at_least,
    binomial_at_most,
    binomial_mass,
    normal_quantile,
    share_bounds,
    student_quantile,
    student_tail,
)
from quantlab.eval.result import Estimate

# Berger and Boos (1994): the nuisance parameter is searched within a confidence interval that misses it this often, and
# the p-value pays for it by as much. Small, so that gates at alpha = 0.001 after Holm's correction still have room.
BERGER_BOOS = 1e-5
NUISANCE_POINTS = 13  # the probability hardly moves between them: it is nearly the same at every flip rate
REACH = 5.5  # standard deviations of the number of flips that sums run over: 4e-8 is left out
# Where only a handful of items flip, exact tests move in jumps that no formula follows. Both found by enumeration, for
# flip rates of 0 to 20 %, margins of 0.5 to 5 points, 40 to 5,000 items, alpha from 0.05 down to 0.005.
SMALL_SAMPLE = 0.7
SPARE_FLIPS = 3.0
DROP_HALVINGS = 17  # a drop to 1e-5, a thousandth of a point


def mean_of_clusters(totals: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The mean of values known by their sum and count in each cluster, with its clustered standard error.

    A single cluster has no standard error. Raises ValueError when there is no value at all.
    """
    items, clusters = sum(counts), len(counts)
    if items == 0:
        raise ValueError("no values to average")
    mean = math.fsum(totals) / items
    if clusters < 2:
        return Estimate(value=mean, clusters=clusters)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    # The factor is the small-sample correction CR1: without it a handful of windows looks too sure.
    error = math.sqrt(squares * clusters / (clusters - 1)) / items
    return Estimate(value=mean, standard_error=error, clusters=clusters)


def clustered_mean(values_by_cluster: Sequence[Sequence[float]]) -> Estimate:
    """The mean of all values, with a standard error that takes each inner sequence as one cluster."""
    groups = [values for values in values_by_cluster if len(values)]
    return mean_of_clusters([math.fsum(values) for values in groups], [len(values) for values in groups])


def paired_difference(
    baseline: Sequence[float], candidate: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """The mean of candidate minus baseline, item by item; `clusters` names each item's cluster (None: its own)."""
    differences = [after - before for before, after in zip(baseline, candidate, strict=True)]
    if clusters is None:
        return mean_of_clusters(differences, [1] * len(differences))
    groups: dict[Hashable, list[float]] = {}
    for cluster, difference in zip(clusters, differences, strict=True):
        groups.setdefault(cluster, []).append(difference)
    return clustered_mean(list(groups.values()))


def interval(estimate: Estimate, level: float = 0.95) -> tuple[float, float]:
    """The two-sided confidence interval of an estimate; infinite when its standard error is unknown."""
    if estimate.standard_error is None:
        return -math.inf, math.inf
    reach = estimate.standard_error * student_quantile((1.0 + level) / 2.0, _degrees(estimate))
    return estimate.value - reach, estimate.value + reach


def p_above(estimate: Estimate, limit: float) -> float:
    """One-sided p-value for "the true mean is above `limit`": small when the data could hardly come from below it."""
    if estimate.standard_error is None:
        return 1.0
    if estimate.standard_error == 0.0:
        return 0.0 if estimate.value > limit else 1.0
    return student_tail((estimate.value - limit) / estimate.standard_error, _degrees(estimate))


def p_below(estimate: Estimate, limit: float) -> float:
    """One-sided p-value for "the true mean is below `limit`"."""
    return p_above(estimate.model_copy(update={"value": -estimate.value}), -limit)


def _degrees(estimate: Estimate) -> int:
    """Degrees of freedom of Student's t; an estimate that does not say has so many clusters that it does not matter."""
    return 10**9 if estimate.clusters is None else max(1, estimate.clusters - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted (Holm 1979): rejecting those <= alpha errs even once with probability at most alpha."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def mcnemar_worse(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact one-sided McNemar p-value for "the candidate is worse": P(X >= right_to_wrong), X of all flips at 1/2."""
    return binomial_at_least(right_to_wrong, right_to_wrong + wrong_to_right, 0.5)


def score(b: int, c: int, items: int, loss: float) -> float:
    """Tango's score statistic (Statistics in Medicine 17, 1998): how far the observed loss is above `loss`, in sigmas.

    At loss 0 it is McNemar's (b - c) / sqrt(b + c).
    """
    gained = _likeliest_gain(b, c, items, loss)
    variance = items * (2.0 * gained + loss * (1.0 - loss))
    distance = b - c - items * loss
    return distance / math.sqrt(variance) if variance > 0.0 else math.copysign(math.inf, distance) if distance else 0.0


def _likeliest_gain(b: float, c: float, items: float, loss: float) -> float:
    """The share of wrong-to-right flips that is likeliest if the loss is exactly `loss` (Tango's equation)."""
    quadratic, linear = 2.0 * items, (2.0 * items - b + c) * loss - b - c
    root = linear * linear + 4.0 * quadratic * c * loss * (1.0 - loss)
    return max(0.0, -loss, (math.sqrt(max(0.0, root)) - linear) / (2.0 * quadratic))


def p_loss_below(b: int, c: int, items: int, margin: float) -> float:
    """Exact p-value for "the true loss is below `margin`" (non-inferiority), margin in (0, 1).

    The probability, if the loss were `margin`, of a score as low as the observed one, at the worst flip rate that the
    data allow: unconditional (Hsueh, Liu and Chen, Biometrics 57, 2001) with Berger and Boos's interval. Unlike the
    normal approximation it never passes too often, however few the flips.
    """
    observed = score(b, c, items, margin)
    return _worst_case(b + c, items, margin, lambda x, y: score(x, y, items, margin) <= observed + 1e-9, below=True)


def p_loss_above(b: int, c: int, items: int, margin: float) -> float:
    """Exact p-value for "the true loss is above `margin`", margin in [0, 1); at margin 0 McNemar's exact test."""
    if margin == 0.0:
        return mcnemar_worse(b, c)
    observed = score(b, c, items, margin)
    return _worst_case(b + c, items, margin, lambda x, y: score(x, y, items, margin) < observed - 1e-9, below=False)


def difference_interval(b: int, c: int, items: int, level: float = 0.95) -> tuple[float, float]:
    """Tango's two-sided interval of candidate's minus baseline's accuracy, the losses that its score cannot exclude."""
    z = normal_quantile((1.0 + level) / 2.0)
    observed = (b - c) / items
    most = _crossing(lambda loss: score(b, c, items, loss) > -z, observed, 1.0)
    least = _crossing(lambda loss: score(b, c, items, loss) < z, observed, -1.0)
    return -most, -least


def _crossing(inside: Callable[[float], bool], start: float, end: float, halvings: int = 50) -> float:
    """Where a condition that holds at `start` stops holding on the way to `end`."""
    for _ in range(halvings):
        middle = (start + end) / 2.0
        start, end = (middle, end) if inside(middle) else (start, middle)
    return start


def _worst_case(flips: int, items: int, loss: float, low_score: Callable[[int, int], bool], below: bool) -> float:
    """The largest probability of the region (its complement unless `below`) over the flip rates that the data allow."""
    low, high = share_bounds(flips, items, BERGER_BOOS / 2.0)
    low, high = max(low, loss), min(high, 1.0)
    if high < low:  # so many flips as a loss of `loss` needs are themselves excluded
        return BERGER_BOOS if below else 1.0
    rates = [low + (high - low) * step / (NUISANCE_POINTS - 1) for step in range(NUISANCE_POINTS)]
    region = _region(items, low, high, low_score)
    shares = [_share_inside(region, items, rate, loss) for rate in rates]
    worst = max(shares) if below else 1.0 - min(shares)
    return min(1.0, worst + BERGER_BOOS)


def _flip_range(items: int, low_rate: float, high_rate: float) -> range:
    """Numbers of flips that matter at flip rates between the two."""
    least = items * low_rate - REACH * math.sqrt(items * low_rate) - 5.0
    most = items * high_rate + REACH * math.sqrt(items * high_rate) + 25.0
    return range(max(0, math.floor(least)), min(items, math.ceil(most)) + 1)


def _region(items: int, low_rate: float, high_rate: float, inside: Callable[[int, int], bool]) -> dict[int, int]:
    """Number of flips -> the largest b inside (-1: none); one more flip never lowers it, so a walk finds all."""
    span = _flip_range(items, low_rate, high_rate)
    edge = bisect_left(range(span.start + 1), True, key=lambda b: not inside(b, span.start - b)) - 1
    region: dict[int, int] = {}
    for flips in span:
        while edge < flips and inside(edge + 1, flips - edge - 1):
            edge += 1
        region[flips] = edge
    return region


def _share_inside(region: dict[int, int], items: int, rate: float, loss: float) -> float:
    """P(b <= region[b + c]) when flips come at `rate` and the loss is `loss`."""
    toward_wrong = min(1.0, (rate + loss) / (2.0 * rate)) if rate > 0.0 else 1.0
    if rate >= 1.0:
        return binomial_at_most(region[items], items, toward_wrong)
    span = _flip_range(items, rate, rate)
    weight, total = binomial_mass(span.start, items, rate), 0.0
    for flips, below in _at_most(region, span, toward_wrong):
        total += weight * below
        weight *= (items - flips) / (flips + 1) * rate / (1.0 - rate)
    return total


def _at_most(region: dict[int, int], span: range, share: float) -> Iterator[tuple[int, float]]:
    """(flips, P(X <= region[flips])), X of `flips` at `share`: each from the one before, as is P(X = region[flips])."""
    rest = 1.0 - share
    edge = region[span.start]
    below = binomial_at_most(edge, span.start, share)
    mass = binomial_mass(edge, span.start, share) if edge >= 0 else 0.0
    yield span.start, below
    for flips in span[1:]:
        below -= share * mass
        mass *= flips / (flips - edge) * rest
        while edge < region[flips]:
            edge += 1
            mass = (
                mass * (flips - edge + 1) / edge * share / rest if edge and rest else binomial_mass(edge, flips, share)
            )
            below += mass
        yield flips, below


def drop_power(items: int, flip_rate: float, drop: float, alpha: float, margin: float = 0.0) -> float:
    """The probability that a true loss of `drop` is shown at `alpha` to be above `margin`.

    By McNemar's exact test at margin 0; elsewhere the score stands for the exact test, too hopeful with few flips.
    """
    rate = min(1.0, max(flip_rate, drop))
    return 1.0 - _share_inside(_missed(items, rate, alpha, margin), items, rate, drop)


@lru_cache(maxsize=32)
def _missed(items: int, rate: float, alpha: float, margin: float) -> dict[int, int]:
    """The region in which a loss above `margin` is not shown."""
    z = normal_quantile(1.0 - alpha)

    def missed(b: int, c: int) -> bool:
        return (margin > 0.0 and score(b, c, items, margin) < z) or mcnemar_worse(b, c) > alpha

    return _region(items, rate, rate, missed)


def smallest_drop(items: int, flip_rate: float, alpha: float = 0.05, power: float = 0.8, margin: float = 0.0) -> float:
    """The least true loss of accuracy that is shown to be above `margin` with probability `power` on this many items.

    `flip_rate` is the share of items expected to flip; a loss above it makes more flip. 1.0: not even that is found.
    """
    if drop_power(items, flip_rate, 1.0, alpha, margin) < power:
        return 1.0
    found = _crossing(lambda drop: drop_power(items, flip_rate, drop, alpha, margin) >= power, 1.0, 0.0, DROP_HALVINGS)
    return min(1.0, found + SPARE_FLIPS / items) if margin else found


def items_needed(margin: float, flip_rate: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Items on which a candidate without loss is shown to lose less than `margin` with probability `power`.

    `flip_rate` is the share of items whose answer changes between right and wrong, as often one way as the other.
    """
    gained = _likeliest_gain(flip_rate / 2.0, flip_rate / 2.0, 1.0, margin)
    at_margin, at_zero = 2.0 * gained + margin * (1.0 - margin), flip_rate
    z = normal_quantile(1.0 - alpha) * math.sqrt(at_margin) + normal_quantile(power) * math.sqrt(at_zero)
    return math.ceil(z * z / margin**2 + SMALL_SAMPLE / margin)
