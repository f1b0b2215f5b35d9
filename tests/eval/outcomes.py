"""Measurements made by hand, for judging: one text and paired answers with chosen figures."""

import math

from quantlab.eval.result import (
    Estimate,
    Histogram,
    NoiseFloor,
    Percentiles,
    Protocol,
    TaskNoise,
    TaskResult,
    TextNoise,
    TextResult,
)

DIGEST = "0" * 64
EMPTY = Estimate(value=0.0)


def text_result(
    name: str = "books",
    log_ratio: Estimate = EMPTY,
    kl: Estimate = EMPTY,
    agreement: Estimate = EMPTY,
    tokens: int = 40_000,
) -> TextResult:
    """One text; percentiles of the KL divergence are multiples of its mean."""
    return TextResult(
        name=name,
        protocol=Protocol(
            name="gptq-1024",
            text=DIGEST,
            tokenizer=DIGEST,
            bos="none",
            window=1024,
            tokens=tokens,
            words=tokens,
            bytes=4 * tokens,
            dtype="bfloat16",
            digest=DIGEST,
        ),
        baseline_perplexity=Estimate(value=25.0, standard_error=1.0, clusters=40),
        perplexity=Estimate(value=25.0 * math.exp(log_ratio.value), standard_error=1.0, clusters=40),
        log_ratio=log_ratio,
        baseline_bits_per_byte=1.0,
        bits_per_byte=1.0,
        kl=Percentiles(
            mean=kl,
            median=0.5 * kl.value,
            p90=2 * kl.value,
            p95=3 * kl.value,
            p99=6 * kl.value,
            p999=10 * kl.value,
            maximum=30 * kl.value,
        ),
        agreement=agreement,
        delta_p=Estimate(value=-0.001, standard_error=0.0002, clusters=40),
        delta_p_rms=Estimate(value=0.02, standard_error=0.001, clusters=40),
        positions=(),
        kl_histogram=Histogram(edges=(0.0, 1.0), counts=(1,)),
    )


def task_result(name: str, worse: int, better: int, items: int, right: int | None = None) -> TaskResult:
    """One task on which the candidate lost `worse` items, won `better` and has `right` (half of them) right."""
    correct = items // 2 if right is None else right
    return TaskResult(
        name=name,
        metric="acc",
        items=items,
        data=DIGEST,
        baseline=Estimate(value=(correct + worse - better) / items),
        candidate=Estimate(value=correct / items),
        difference=Estimate(value=(better - worse) / items),
        low=0.0,
        high=0.0,
        right_to_wrong=worse,
        wrong_to_right=better,
        answers_changed=worse + better,
        mcnemar_p=1.0,
        smallest_drop=1.0,
        flips=(),
    )


def noise_floor(log_ratio: float = 0.0, kl: float = 0.0, flips: int = 0, task: str = "piqa") -> NoiseFloor:
    """The noise of the text `books` and of 1,000 items of one task."""
    return NoiseFloor(
        batch_sizes=(1, 8),
        texts=(TextNoise(name="books", kl=kl, log_ratio=log_ratio, disagreement=kl),),
        tasks=(TaskNoise(name=task, items=1_000, flips=flips),),
    )
