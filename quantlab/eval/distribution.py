"""What the scores of single tokens say together: means with errors, order statistics, slices, a histogram.

Standard errors are clustered by window, since tokens of one window err together. Definitions are llama.cpp's
(`llama-perplexity --kl-divergence`), checked in the tests on a case worked out by hand. Knows nothing about models.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.eval.result import Estimate, Histogram, Percentiles, Position, Protocol, TextNoise, TextResult
from quantlab.eval.scoring import TokenScores
from quantlab.eval.statistics import mean_of_clusters

KL_DECADES = (-7, 2)  # below 1e-7 nats lies what fp32 cannot tell from nothing; above 100 lies one bin
BINS_A_DECADE = 4
MAX_NATS = 200.0  # exp of more, times its error, is beyond what a result file holds; so bad a model is broken anyway


def text_result(name: str, protocol: Protocol, scores: TokenScores, lengths: Sequence[int]) -> TextResult:
    """Everything that is told of one text; `lengths` are the scored tokens of each window, in order."""
    before, after = _mean(scores.baseline_nll, lengths), _mean(scores.nll, lengths)
    bits_a_nat = protocol.tokens / max(1, protocol.bytes) / math.log(2)
    whole_words = protocol.tokens / protocol.words if protocol.name.startswith("rolling") else None
    return TextResult(
        name=name,
        protocol=protocol,
        baseline_perplexity=_exp(before),
        perplexity=_exp(after),
        log_ratio=_mean(scores.nll - scores.baseline_nll, lengths),
        baseline_bits_per_byte=before.value * bits_a_nat,
        bits_per_byte=after.value * bits_a_nat,
        baseline_word_perplexity=None if whole_words is None else _capped_exp(before.value * whole_words),
        word_perplexity=None if whole_words is None else _capped_exp(after.value * whole_words),
        kl=percentiles(scores.kl, lengths),
        agreement=_mean(scores.agree.double(), lengths),
        delta_p=_mean(scores.delta_p, lengths),
        delta_p_rms=_root(_mean(scores.delta_p.square(), lengths)),
        positions=positions(scores, lengths),
        kl_histogram=kl_histogram(scores.kl),
    )


def text_noise(name: str, scores: TokenScores) -> TextNoise:
    """What the baseline against itself shows, as magnitudes."""
    return TextNoise(
        name=name,
        kl=scores.kl.mean().item(),
        log_ratio=abs((scores.nll - scores.baseline_nll).mean().item()),
        disagreement=1.0 - scores.agree.double().mean().item(),
    )


def percentiles(values: Tensor, lengths: Sequence[int]) -> Percentiles:
    """Mean and order statistics of values: [T] fp64, interpolated linearly between ranks as llama.cpp does."""
    ranked = values.sort().values

    def at(share: float) -> float:
        place = share * (len(ranked) - 1)
        low = int(place)
        high = min(low + 1, len(ranked) - 1)
        return ((1 - place + low) * ranked[low] + (place - low) * ranked[high]).item()

    return Percentiles(
        mean=_mean(values, lengths),
        median=at(0.5),
        p90=at(0.9),
        p95=at(0.95),
        p99=at(0.99),
        p999=at(0.999),
        maximum=at(1.0),
    )


def positions(scores: TokenScores, lengths: Sequence[int]) -> tuple[Position, ...]:
    """Means over slices of the window, each at most half as long as what lies before it."""
    longest = max(lengths)  # a row of which less is scored has its context before it
    place = torch.cat([torch.arange(longest - length, longest) for length in lengths])
    edges = _edges(longest)
    found = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        inside = (place >= start) & (place < stop)
        means = [column[inside].mean().item() for column in (scores.baseline_nll, scores.nll, scores.kl)]
        found.append(Position(start=start, stop=stop, baseline_nll=means[0], candidate_nll=means[1], kl=means[2]))
    return tuple(found)


def kl_histogram(kl: Tensor) -> Histogram:
    """Counts of kl: [T] in nats by order of magnitude; the first bin begins at 0, the last ends at the maximum."""
    low, high = KL_DECADES
    steps = torch.arange(low * BINS_A_DECADE, high * BINS_A_DECADE + 1, dtype=torch.float64) / BINS_A_DECADE
    edges = [0.0, *(10.0**steps).tolist()]
    edges.append(max(10.0 * edges[-1], kl.max().item()))
    index = torch.bucketize(kl, torch.tensor(edges[1:-1], dtype=kl.dtype), right=True)
    counts = torch.bincount(index, minlength=len(edges) - 1).tolist()
    return Histogram(edges=tuple(edges), counts=tuple(counts))


def _edges(longest: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, ... up to `longest`: powers of two and the middles between them."""
    edges = [0]
    power = 1
    while power < longest:
        edges += [power] if power == 1 else [power, power + power // 2]
        power *= 2
    return [edge for edge in edges if edge < longest] + [longest]


def _mean(values: Tensor, lengths: Sequence[int]) -> Estimate:
    totals = [part.sum().item() for part in values.split(list(lengths))]
    return mean_of_clusters(totals, list(lengths))


def _exp(nll: Estimate) -> Estimate:
    """Perplexity of a mean negative log likelihood; the error to first order, as llama.cpp has it."""
    value = _capped_exp(nll.value)
    return _changed(nll, value, value)


def _capped_exp(nats: float) -> float:
    return math.exp(min(nats, MAX_NATS))


def _root(squares: Estimate) -> Estimate:
    """Square root of a mean; the error to first order."""
    value = math.sqrt(squares.value)
    return _changed(squares, value, 0.5 / value if value else 0.0)


def _changed(estimate: Estimate, value: float, slope: float) -> Estimate:
    error = None if estimate.standard_error is None else estimate.standard_error * slope
    return Estimate(value=value, standard_error=error, clusters=estimate.clusters)
