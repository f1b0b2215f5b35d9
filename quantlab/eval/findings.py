"""One requirement against one measured quantity: the evidence for it, the evidence against it, and the words.

Every quantity has its test: Student's t on clustered means, exact binomial on shares, exact paired tests on accuracies.
Knows nothing about other lines: `gate` corrects for looking at many and decides.
"""

import math
from dataclasses import dataclass

from quantlab.eval.gate_file import Rule
from quantlab.eval.metrics import Mean, Order, Pairs, Quantity, Share
from quantlab.eval.probability import binomial_at_least, binomial_at_most, normal_quantile, share_bounds
from quantlab.eval.result import Estimate
from quantlab.eval.statistics import (
    difference_interval,
    interval,
    items_needed,
    p_above,
    p_below,
    p_loss_above,
    p_loss_below,
    smallest_drop,
)

POWER = 0.8
LARGEST_LOG = 600.0  # a bound from a few wild windows may lie beyond what a double can hold
MUCH_MORE = 50.0  # times the text: beyond this, more text is no advice


@dataclass(frozen=True, slots=True)
class Finding:
    """What the data say about one requirement.

    `p_fail` is small when a candidate that meets the requirement would hardly look this bad, `p_pass` when one that
    violates it would hardly look this good. A plain number has neither: `p_fail` is None and `p_pass` 0 or 1.
    A guard (`p_pass` None) passes unless it fails. The last four are words: what was seen, and each outcome's.
    """

    requirement: str
    limit: float
    measured: float
    low: float | None
    high: float | None
    p_fail: float | None
    p_pass: float | None
    below_noise: bool
    observed: str
    shown: str
    refuted: str
    unsettled: str


def examine(rule: Rule, quantity: Quantity, alpha: float, lines: int) -> Finding:
    """The evidence on one rule; `lines` is how many the gate has, for the power of one after correction."""
    if rule.test is not None:
        assert isinstance(quantity, Pairs), "a gate file allows tests on accuracies alone"
        if rule.test == "noninferiority":
            return _noninferior(rule, quantity, alpha)
        return _mcnemar(rule, quantity, alpha, lines)
    if isinstance(quantity, Pairs):
        quantity = Share(quantity.right, quantity.items)
    if isinstance(quantity, Mean):
        return _mean(rule, quantity, alpha)
    return _share(rule, quantity, alpha) if isinstance(quantity, Share) else _order(rule, quantity)


def _mean(rule: Rule, mean: Mean, alpha: float) -> Finding:
    """A mean against its limit, by Student's t over clusters."""
    limit, above = _limit(rule)
    edge = math.log(limit) if mean.logarithm else limit
    low, high = (_read(mean, bound) for bound in interval(mean.estimate, 1.0 - 2.0 * alpha))
    value = _read(mean, mean.estimate.value)
    over, under = p_above(mean.estimate, edge), p_below(mean.estimate, edge)
    exact = mean.estimate.standard_error == 0.0 and mean.estimate.value == edge  # a limit is itself allowed
    known = mean.estimate.standard_error is not None
    return Finding(
        requirement=_requirement(rule),
        limit=limit,
        measured=value,
        low=low if known else None,
        high=high if known else None,
        p_fail=over if above else under,
        p_pass=0.0 if exact else under if above else over,
        below_noise=_is_noise(mean),
        observed=f"{number(value)} ({_between(number(low), number(high), alpha)})" if known else number(value),
        shown=f"shown to be {_requirement(rule)}",
        refuted=f"shown to be {'above' if above else 'below'} {number(limit)}",
        unsettled=_more_text(mean.estimate, edge, alpha),
    )


def _share(rule: Rule, share: Share, alpha: float) -> Finding:
    """A share of items against its limit, by the exact binomial test."""
    limit, above = _limit(rule)
    low, high = share_bounds(share.count, share.items, alpha)
    at_least = binomial_at_least(share.count, share.items, limit)
    at_most = binomial_at_most(share.count, share.items, limit)
    value = share.count / share.items
    bounds = _between(number(low), number(high), alpha)
    return Finding(
        requirement=_requirement(rule),
        limit=limit,
        measured=value,
        low=low,
        high=high,
        p_fail=at_least if above else at_most,
        p_pass=at_most if above else at_least,
        below_noise=share.noise is not None and value <= share.noise,
        observed=f"{number(value)} ({share.count:,} of {share.items:,} items; {bounds})",
        shown=f"shown to be {_requirement(rule)}",
        refuted=f"shown to be {'above' if above else 'below'} {number(limit)}",
        unsettled=f"{share.items:,} items cannot tell it from {number(limit)}",
    )


def _order(rule: Rule, order: Order) -> Finding:
    """An order statistic against its limit, as a plain number."""
    limit, above = _limit(rule)
    holds = order.value <= limit if above else order.value >= limit
    return Finding(
        requirement=_requirement(rule),
        limit=limit,
        measured=order.value,
        low=None,
        high=None,
        p_fail=None,
        p_pass=0.0 if holds else 1.0,
        below_noise=False,
        observed=number(order.value),
        shown=f"is {_requirement(rule)}",
        refuted=f"is {'above' if above else 'below'} {number(limit)}",
        unsettled="",
    )


def _noninferior(rule: Rule, pairs: Pairs, alpha: float) -> Finding:
    """The loss of accuracy shown to be below the margin, or above it."""
    low, high = difference_interval(pairs.right_to_wrong, pairs.wrong_to_right, pairs.items, 1.0 - 2.0 * alpha)
    needed = items_needed(rule.margin, pairs.flip_rate, alpha, POWER)
    margin = points(rule.margin)
    counts = (pairs.right_to_wrong, pairs.wrong_to_right, pairs.items, rule.margin)
    return Finding(
        requirement=f"loss below {margin}",
        limit=0.0 - rule.margin,
        measured=-pairs.loss,
        low=low,
        high=high,
        p_fail=p_loss_above(*counts),
        p_pass=p_loss_below(*counts),
        below_noise=_flips_are_noise(pairs),
        observed=_change(pairs, low, high, alpha),
        shown=f"shown to lose less than {margin}",
        refuted=f"shown to lose more than {margin}",
        unsettled=(
            f"{pairs.items:,} items are too few: with as many flips, a candidate without loss needs about {needed:,}"
            if pairs.items < needed
            else f"the loss is too near {margin} for {pairs.items:,} items to tell"
        ),
    )


def _mcnemar(rule: Rule, pairs: Pairs, alpha: float, lines: int) -> Finding:
    """A guard: fails only when the loss is shown to be above the margin (0: when any loss is shown)."""
    low, high = difference_interval(pairs.right_to_wrong, pairs.wrong_to_right, pairs.items, 1.0 - 2.0 * alpha)
    caught = smallest_drop(pairs.items, pairs.flip_rate, alpha / lines, POWER, rule.margin)
    beyond = f" above {points(rule.margin)}" if rule.margin else ""
    return Finding(
        requirement=f"no loss{beyond} shown",
        limit=0.0 - rule.margin,
        measured=-pairs.loss,
        low=low,
        high=high,
        p_fail=p_loss_above(pairs.right_to_wrong, pairs.wrong_to_right, pairs.items, rule.margin),
        p_pass=None,
        below_noise=_flips_are_noise(pairs),
        observed=_change(pairs, low, high, alpha),
        shown=f"no loss{beyond} shown; {pairs.items:,} items show one of {points(caught)} four times in five",
        refuted=f"a loss{beyond} is shown",
        unsettled="",
    )


def _limit(rule: Rule) -> tuple[float, bool]:
    """The limit, and whether it must not be exceeded."""
    if rule.max is not None:
        return rule.max, True
    assert rule.min is not None, "a rule without a test has a limit"
    return rule.min, False


def _requirement(rule: Rule) -> str:
    limit, above = _limit(rule)
    return f"{'at most' if above else 'at least'} {number(limit)}"


def _read(mean: Mean, value: float) -> float:
    return math.exp(min(value, LARGEST_LOG)) if mean.logarithm else value


def _is_noise(mean: Mean) -> bool:
    if mean.noise is None or mean.same is None:
        return False
    return abs(mean.estimate.value - mean.same) <= mean.noise


def _flips_are_noise(pairs: Pairs) -> bool:
    return pairs.noise is not None and abs(pairs.loss) <= pairs.noise


def _more_text(estimate: Estimate, edge: float, alpha: float) -> str:
    """How much more text would settle the question, by the usual rule for a mean."""
    if estimate.standard_error is None:
        return "one window gives no standard error: measure more text"
    reach = (normal_quantile(1.0 - alpha) + normal_quantile(POWER)) * estimate.standard_error
    times = (reach / abs(estimate.value - edge)) ** 2 if estimate.value != edge else math.inf
    if times > MUCH_MORE:
        return "too near the limit to tell"
    return f"the limit is within the error; about {max(times, 1.1):.1f} times the text would settle it"


def _change(pairs: Pairs, low: float, high: float, alpha: float) -> str:
    """The change of accuracy in points with its bounds; rounding to a hundredth leaves no minus on a zero."""
    change, low, high = (round(100.0 * share, 2) + 0.0 for share in (-pairs.loss, low, high))
    return f"{change:+.2f} points ({_between(f'{low:+.2f}', f'{high:+.2f}', alpha)})"


def _between(low: str, high: str, alpha: float) -> str:
    """Both one-sided bounds; each is wrong with probability alpha."""
    return f"{100.0 * (1.0 - alpha):.3g} % bounds {low} and {high}"


def number(value: float) -> str:
    """`1.0431`, `0.0481`, `0.00221`: four decimals, or three digits below a tenth and beyond a million."""
    if 0.1 <= abs(value) < 1e6:
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:.3g}"


def points(share: float) -> str:
    """A share of accuracy in points: `2 points`, `0.5 points`."""
    value = f"{100.0 * share:.2f}".rstrip("0").rstrip(".")
    return f"{value} point{'' if value == '1' else 's'}"
