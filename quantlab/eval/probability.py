"""Tails and quantiles of the normal, Student's t and binomial distributions, in plain Python.

The command line reads a gate before any heavy import, so none of this may need SciPy. Knows nothing about models.
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

MANY = 10_000  # degrees of freedom from which Student's t is the normal to four digits of a tail
EPSILON = 1e-15
TINY = 1e-300
FRACTION_TERMS = 2_000
BISECTIONS = 52  # halves a bracket of 1 to the last bit of a double


def normal_quantile(probability: float) -> float:
    """The z with P(Z <= z) = probability, strictly between 0 and 1."""
    return NormalDist().inv_cdf(probability)


def student_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t with `degrees` >= 1 degrees of freedom."""
    if degrees > MANY:
        return 0.5 * math.erfc(t / math.sqrt(2.0))
    half = 0.5 * beta_share(degrees / (degrees + t * t), degrees / 2.0, 0.5)
    return half if t >= 0 else 1.0 - half


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = probability, strictly between 0 and 1."""
    if probability < 0.5:
        return -student_quantile(1.0 - probability, degrees)
    low, high = 0.0, 1.0
    while student_tail(high, degrees) > 1.0 - probability:
        low, high = high, high * 2.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_tail(middle, degrees) > 1.0 - probability else (low, middle)
    return (low + high) / 2.0


def beta_share(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # the fraction converges fast on the other side
        return 1.0 - beta_share(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _fraction(x, a, b))


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) by the modified Lentz algorithm."""
    value, c, d = 1.0, 1.0, 0.0
    for term in range(1, FRACTION_TERMS):
        m = term // 2
        if term % 2:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / ((1.0 + step * d) or TINY)
        c = (1.0 + step / c) or TINY
        value *= c * d
        if abs(c * d - 1.0) < EPSILON:
            break
    return value


def binomial_at_most(count: int, trials: int, probability: float) -> float:
    """P(X <= count) of `trials` draws that each succeed with `probability`."""
    if count < 0:
        return 0.0
    return 1.0 if count >= trials else beta_share(1.0 - probability, trials - count, count + 1.0)


def binomial_at_least(count: int, trials: int, probability: float) -> float:
    """P(X >= count) of the same, without the loss of digits of 1 - P(X < count)."""
    if count <= 0:
        return 1.0
    return 0.0 if count > trials else beta_share(probability, count, trials - count + 1.0)


def binomial_mass(count: int, trials: int, probability: float) -> float:
    """P(X = count)."""
    if probability <= 0.0 or probability >= 1.0:
        return float(count == (trials if probability >= 1.0 else 0))
    choose = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    return math.exp(choose + count * math.log(probability) + (trials - count) * math.log1p(-probability))


@cache
def share_bounds(count: int, trials: int, alpha: float) -> tuple[float, float]:
    """One-sided Clopper-Pearson bounds of a share, each wrong with probability at most `alpha`."""
    low = 0.0 if count == 0 else _root(lambda p: binomial_at_least(count, trials, p), alpha)
    high = 1.0 if count == trials else 1.0 - _root(lambda q: binomial_at_most(count, trials, 1.0 - q), alpha)
    return low, high


def _root(tail: Callable[[float], float], level: float) -> float:
    """Where `tail`, which rises on [0, 1], reaches `level`."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if tail(middle) < level else (low, middle)
    return (low + high) / 2.0
