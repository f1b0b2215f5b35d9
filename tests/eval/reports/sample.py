"""A result made by hand: what an INT4 copy of a small model might have got, on two texts and three tasks."""

import hashlib
import math

from quantlab.eval.result import (
    Estimate,
    Flip,
    GateLine,
    GateResult,
    Histogram,
    LayerError,
    Machine,
    ModelFacts,
    NoiseFloor,
    Percentiles,
    Position,
    Protocol,
    Report,
    TaskNoise,
    TaskResult,
    TextNoise,
    TextResult,
    Verdict,
)

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
LINEARS += ("mlp.up_proj", "mlp.down_proj")


def digest(text: str) -> str:
    """A digest that stands for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


def model(path: str, scheme: str, bits: float, size: int) -> ModelFacts:
    """One model that took part."""
    return ModelFacts(
        path=path,
        architecture="LlamaForCausalLM",
        scheme=scheme,
        bits_per_weight=bits,
        bytes=size,
        weights=digest(path),
        tokenizer=digest("tokenizer"),
    )


def text_result(name: str, baseline: float, candidate: float, kl: float) -> TextResult:
    """One text: perplexities as given, KL with a long tail, both better the later in the window."""
    protocol = Protocol(
        name="gptq-1024",
        text=digest(name),
        tokenizer=digest("tokenizer"),
        bos="once",
        window=1024,
        tokens=32736,
        words=25107,
        bytes=139264,
        dtype="bfloat16",
        digest=digest(name + " protocol"),
    )
    edges = tuple(10 ** (-7 + i / 4) for i in range(33))
    counts = tuple(round(4000 * math.exp(-(((i - 20) / 4.5) ** 2) / 2)) for i in range(32))
    return TextResult(
        name=name,
        protocol=protocol,
        baseline_perplexity=Estimate(value=baseline, standard_error=baseline * 0.012),
        perplexity=Estimate(value=candidate, standard_error=candidate * 0.012),
        log_ratio=Estimate(value=math.log(candidate / baseline), standard_error=0.0013, clusters=32),
        baseline_bits_per_byte=math.log2(baseline) * 32736 / 139264,
        bits_per_byte=math.log2(candidate) * 32736 / 139264,
        kl=Percentiles(
            mean=Estimate(value=kl, standard_error=kl / 60),
            median=kl / 2, p90=kl * 2.2, p95=kl * 3.1, p99=kl * 6, p999=kl * 14, maximum=kl * 55,
        ),
        agreement=Estimate(value=0.865, standard_error=0.0021),
        delta_p=Estimate(value=-0.0038, standard_error=0.0003),
        delta_p_rms=Estimate(value=0.0431, standard_error=0.0006),
        positions=tuple(
            Position(
                start=i * 64,
                stop=i * 64 + 64,
                baseline_nll=math.log(baseline) + 0.7 / (i + 1) - 0.15,
                candidate_nll=math.log(candidate) + 0.72 / (i + 1) - 0.15,
                kl=kl * (1 + 0.4 / (i + 1)),
            )
            for i in range(16)
        ),
        kl_histogram=Histogram(edges=edges, counts=counts),
    )  # fmt: skip


def task_result(name: str, metric: str, lost: int, won: int, flips: tuple[Flip, ...] = ()) -> TaskResult:
    """One task of 400 items, of which the baseline got 240 right."""
    difference = (won - lost) / 400
    error = math.sqrt((won + lost) / 400 - difference**2) / 20
    worse = sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1)) / 2 ** (lost + won)
    return TaskResult(
        name=name,
        metric=metric,
        items=400,
        data=digest(name + " items"),
        baseline=Estimate(value=0.6, standard_error=0.0245),
        candidate=Estimate(value=0.6 + difference, standard_error=0.0245),
        difference=Estimate(value=difference, standard_error=error),
        low=difference - 1.96 * error,
        high=difference + 1.96 * error,
        right_to_wrong=lost,
        wrong_to_right=won,
        answers_changed=lost + won + 7,
        mcnemar_p=worse,
        smallest_drop=2.49 * math.sqrt((lost + won) / 400) / 20,
        flips=flips,
    )


FLIPS = (
    Flip(index=3, prompt="Goal: keep bread fresh,\nanswer: ", baseline="wrap it", candidate="wet it", was_right=True),
    Flip(index=17, prompt="Question: what is heavier?\nAnswer:", baseline="air", candidate="gold", was_right=False),
)
LINES = (
    GateLine(
        metric="text.held-out books.ppl_ratio", requirement="at most 1.02", limit=1.02,
        measured=1.0431, low=1.0401, high=1.0457, verdict="fail", p_value=3.1e-9,
        reason="1.043 (95 % bounds 1.04 and 1.046): shown to be above 1.02",
    ),
    GateLine(
        metric="text.held-out books.kl.mean", requirement="at most 0.1", limit=0.1,
        measured=0.0481, low=0.0468, high=0.0494, verdict="pass", p_value=1.0,
        reason="0.0481 (95 % bounds 0.0468 and 0.0494): shown to be at most 0.1",
    ),
    GateLine(
        metric="task.piqa", requirement="loss below 1 point", limit=-0.01,
        measured=-0.015, low=-0.0398, high=0.0098, verdict="inconclusive", p_value=0.21, below_noise=True,
        reason="-1.50 points (95 % bounds -3.98 and +0.98): the loss is too near 1 point for 400 items to tell",
    ),
)  # fmt: skip


def gate(verdict: Verdict, *lines: GateLine) -> GateResult:
    """A gate's result."""
    return GateResult(source="default", alpha=0.05, verdict=verdict, lines=lines)


def sample_report() -> Report:
    """A whole report that failed its gate."""
    return Report(
        quantlab="0.1.0",
        created="2026-11-22T10:00:00Z",
        machine=Machine(device="cpu (x86-64, 2 cores)", torch="2.13.0", transformers="5.23.0", threads=2),
        baseline=model("models/books-28m", "bf16", 16.0, 57_210_000),
        candidate=model("out/books-28m-w4a16", "w4a16 g128 symmetric", 4.126, 21_830_000),
        baseline_from_cache=True,
        texts=(text_result("held-out books", 27.004, 28.167, 0.0481), text_result("wikitext-2", 61.2, 64.9, 0.0623)),
        tasks=(
            task_result("piqa", "acc", 21, 15, FLIPS),
            task_result("arc_easy", "acc_norm", 18, 20),
            task_result("lambada_openai", "acc", 40, 12),
        ),
        noise=NoiseFloor(
            batch_sizes=(8, 1),
            texts=(
                TextNoise(name="held-out books", kl=2.1e-5, log_ratio=0.0001, disagreement=0.004),
                TextNoise(name="wikitext-2", kl=2.4e-5, log_ratio=-0.0001, disagreement=0.005),
            ),
            tasks=(TaskNoise(name="piqa", items=400, flips=2), TaskNoise(name="arc_easy", items=400, flips=0)),
        ),
        layers=tuple(
            LayerError(module=f"model.layers.{block}.{name}", error=0.002 * 1.15**block * (1 + place))
            for block in range(8)
            for place, name in enumerate(LINEARS)
        ),
        gate=gate("fail", *LINES),
        seconds={"baseline": 41.2, "candidate": 44.0, "tasks": 130.5},
    )
