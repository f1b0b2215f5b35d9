"""Means, errors and order statistics of token scores: against llama.cpp's formulas and cases worked out by hand."""

import math
import random

import pytest
import torch

from quantlab.eval.distribution import kl_histogram, percentiles, positions, text_noise, text_result
from quantlab.eval.protocol import digest
from quantlab.eval.result import Protocol
from quantlab.eval.scoring import TokenScores
from quantlab.eval.statistics import clustered_mean


def llama_cpp_percentile(values: list[float], fraction: float) -> float:
    """`percentile` of llama.cpp's tools/perplexity, on sorted values."""
    place = fraction * (len(values) - 1)
    index = int(place)
    rest = place - index
    return (1 - rest) * values[index] + rest * values[min(index + 1, len(values) - 1)]


def protocol(name: str = "gptq-4", tokens: int = 6, words: int = 3, size: int = 24) -> Protocol:
    fields = {"name": name, "text": "a" * 64, "tokenizer": "b" * 64, "bos": "none", "window": 4, "tokens": tokens}
    fields |= {"words": words, "bytes": size, "dtype": "float32"}
    return Protocol.model_validate({**fields, "digest": digest(fields)})


def scores_of(baseline: list[float], candidate: list[float], kl: list[float]) -> TokenScores:
    before, after = torch.tensor(baseline).double(), torch.tensor(candidate).double()
    agree = torch.arange(len(baseline)) % 3 > 0
    return TokenScores(before, after, torch.tensor(kl).double(), agree, (-after).exp() - (-before).exp())


SCORES = scores_of([1.0, 2.0, 3.0, 1.0, 1.0, 4.0], [1.5, 2.0, 3.0, 1.0, 2.0, 4.0], [0.5, 0.0, 0.1, 0.2, 0.3, 0.4])
LENGTHS = [3, 3]


def test_a_case_worked_out_by_hand() -> None:
    result = text_result("a", protocol(), SCORES, LENGTHS)
    assert result.baseline_perplexity.value == pytest.approx(math.exp(2.0))
    assert result.perplexity.value == pytest.approx(math.exp(2.25))
    assert result.log_ratio.value == pytest.approx(0.25)
    # Two windows with sums 0.5 and 1 around a mean of 0.75: sqrt((0.25^2 + 0.25^2) * 2 / 1) / 6 tokens.
    assert result.log_ratio.standard_error == pytest.approx(0.5 / 6)
    assert result.log_ratio.clusters == 2
    assert result.perplexity.standard_error == pytest.approx(math.exp(2.25) * abs(7.0 - 6.5) / 6)
    assert result.bits_per_byte == pytest.approx(6 * 2.25 / 24 / math.log(2))
    assert result.kl.mean.value == pytest.approx(0.25)
    assert (result.kl.median, result.kl.maximum) == pytest.approx((0.25, 0.5))
    assert result.agreement.value == pytest.approx(4 / 6)
    change = math.exp(-1.5) - math.exp(-1), math.exp(-2) - math.exp(-1)
    assert result.delta_p.value == pytest.approx(sum(change) / 6)
    assert result.delta_p_rms.value == pytest.approx(math.sqrt((change[0] ** 2 + change[1] ** 2) / 6))
    # llama.cpp: 0.5 / rms times the standard error of the squares
    spread = abs(change[0] ** 2 - change[1] ** 2) / 6
    assert result.delta_p_rms.standard_error == pytest.approx(0.5 / result.delta_p_rms.value * spread)


def test_word_perplexity_belongs_to_the_protocol_of_lm_eval_alone() -> None:
    assert text_result("a", protocol(), SCORES, LENGTHS).word_perplexity is None
    found = text_result("a", protocol("rolling-4"), SCORES, LENGTHS)
    assert found.word_perplexity == pytest.approx(math.exp(6 * 2.25 / 3))
    assert found.baseline_word_perplexity == pytest.approx(math.exp(6 * 2.0 / 3))


def test_order_statistics_are_llama_cpps() -> None:
    source = random.Random(5)
    values = [source.expovariate(1.0) for _ in range(1234)]
    found = percentiles(torch.tensor(values, dtype=torch.float64), [617, 617])
    ranked = sorted(values)
    wanted = [llama_cpp_percentile(ranked, share) for share in (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)]
    assert [found.median, found.p90, found.p95, found.p99, found.p999, found.maximum] == pytest.approx(wanted)


def test_errors_are_clustered_by_window() -> None:
    values = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    found = percentiles(values, [3, 3, 2]).mean
    assert found == clustered_mean([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5]])
    alone = percentiles(values, [1] * 8).mean
    assert found.standard_error is not None and alone.standard_error is not None
    assert found.standard_error > 1.4 * alone.standard_error
    assert percentiles(values, [8]).mean.standard_error is None


def test_positions_cover_the_window_and_average_to_the_whole() -> None:
    lengths = [31, 31, 5]
    kl = torch.rand(67, dtype=torch.float64)
    scores = TokenScores(kl + 1, kl + 2, kl, kl > 0.5, kl - 0.5)
    found = positions(scores, lengths)
    assert [(slot.start, slot.stop) for slot in found][:4] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert found[-1].stop == 31
    assert all(slot.stop == after.start for slot, after in zip(found, found[1:], strict=False))
    place = torch.cat([torch.arange(31 - length, 31) for length in lengths])
    counts = [int(((place >= slot.start) & (place < slot.stop)).sum()) for slot in found]
    assert sum(count * slot.kl for count, slot in zip(counts, found, strict=True)) == pytest.approx(kl.sum().item())
    assert found[3].candidate_nll == pytest.approx((kl[place == 3] + 2).mean().item())


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 63, 64, 65, 2047])
def test_positions_have_no_empty_slice(longest: int) -> None:
    kl = torch.ones(longest, dtype=torch.float64)
    found = positions(TokenScores(kl, kl, kl, kl > 0, kl), [longest])
    assert found[0].start == 0 and found[-1].stop == longest
    assert all(slot.start < slot.stop and slot.kl == 1.0 for slot in found)


def test_every_token_is_in_one_bin() -> None:
    kl = torch.tensor([0.0, 1e-9, 1e-7, 0.5, 0.5, 99.0, 100.0, 5000.0], dtype=torch.float64)
    found = kl_histogram(kl)
    assert len(found.edges) == len(found.counts) + 1
    assert list(found.edges) == sorted(set(found.edges))
    assert sum(found.counts) == 8
    assert found.counts[0] == 2 and found.counts[-1] == 2
    place = next(i for i, edge in enumerate(found.edges) if edge > 0.5) - 1
    assert found.counts[place] == 2
    assert found.edges[-1] >= 5000.0


def test_noise_is_told_as_magnitudes() -> None:
    scores = scores_of([2.0, 2.0], [1.5, 2.0], [0.1, 0.3])
    noise = text_noise("a", scores)
    assert (noise.log_ratio, noise.kl, noise.disagreement) == pytest.approx((0.25, 0.2, 0.5))


def test_a_broken_candidate_still_gives_numbers_that_a_file_may_hold() -> None:
    worst = scores_of([1.0, 1.0], [9000.0, 60000.0], [8000.0, 50000.0])
    result = text_result("a", protocol("rolling-4", tokens=2), worst, [1, 1])
    assert math.isfinite(result.perplexity.value) and result.perplexity.value > 1e80
    assert result.word_perplexity is not None and math.isfinite(result.word_perplexity)
