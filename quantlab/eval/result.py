"""What one evaluation found, as strict data: the only thing that the gate and every report read.

Written as `report.json`; its JSON Schema is published in docs. Imports no torch and knows nothing about how a figure
was measured, judged or drawn.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Final = 1
Verdict = Literal["pass", "fail", "inconclusive"]
# A result file may come from anyone: measured numbers have finite squares, and what a gate derives is finite too.
Real = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0.0, le=1e100, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Some = Annotated[int, Field(ge=1, le=2**63 - 1)]
Items = Annotated[int, Field(ge=1, le=10**6)]  # exact tests take time that grows with them
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """Frozen, and closed to keys that nobody declared."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(Strict):
    """A measured value and its standard error (None: not estimable, for example from a single window).

    `clusters` is how many independent groups stand behind the error; with few, Student's t replaces the normal.
    """

    value: Real
    standard_error: Error | None = None
    clusters: Count | None = None


class ModelFacts(Strict):
    """A model that took part: where it is, what it is, and the digest of its weights."""

    path: str
    architecture: str
    scheme: str  # "bf16", "w4a16 g128 symmetric", ...
    bits_per_weight: Real
    bytes: Count
    weights: Digest
    tokenizer: Digest


class Protocol(Strict):
    """How text was scored; two runs compare only if every field agrees. `name` is what tables print."""

    name: str  # "gptq-2048"
    text: Digest  # of the text's bytes
    tokenizer: Digest
    bos: Literal["none", "once", "each-window"]
    window: Count
    tokens: Some  # scored tokens
    words: Count  # whitespace-separated, of the scored text
    bytes: Some  # UTF-8, of the scored text
    dtype: str  # of the runtime's activations
    digest: Digest  # of all the fields above and of the ids that are fed and scored


class Percentiles(Strict):
    """The distribution of a per-token quantity; the order statistics are llama.cpp's set."""

    mean: Estimate
    median: Real
    p90: Real
    p95: Real
    p99: Real
    p999: Real
    maximum: Real


class Position(Strict):
    """Means over the tokens of a slice of the window, to show what context does."""

    start: Count
    stop: Count
    baseline_nll: Real
    candidate_nll: Real
    kl: Real


class Histogram(Strict):
    """Counts of a per-token quantity between ascending edges; len(edges) == len(counts) + 1."""

    edges: tuple[Real, ...]
    counts: tuple[Count, ...]


class TextResult(Strict):
    """Candidate against baseline on one text. Standard errors are clustered by window; nats unless said."""

    name: str
    protocol: Protocol
    baseline_perplexity: Estimate
    perplexity: Estimate
    log_ratio: Estimate  # ln(candidate perplexity / baseline perplexity), paired
    baseline_bits_per_byte: Real
    bits_per_byte: Real
    # lm-eval's, for the protocol that scores every token as lm-eval does; no other protocol has one
    baseline_word_perplexity: Real | None = None
    word_perplexity: Real | None = None
    kl: Percentiles  # KL(baseline || candidate)
    agreement: Estimate  # share of tokens at which both put the same token first
    delta_p: Estimate  # mean of candidate's minus baseline's probability of the right token
    delta_p_rms: Estimate
    positions: tuple[Position, ...]
    kl_histogram: Histogram


class Flip(Strict):
    """One item whose answer changed between right and wrong; `index` counts from 0 in the task's file."""

    index: Count
    prompt: str
    baseline: str
    candidate: str
    was_right: bool


class TaskResult(Strict):
    """Both models on the same items of one task. Accuracies are shares; the difference is candidate minus baseline."""

    name: str
    metric: str  # "acc", "acc_norm", "exact_match"
    items: Items
    data: Digest  # of the items and the prompts made of them
    baseline: Estimate
    candidate: Estimate
    difference: Estimate  # paired
    low: Real  # paired two-sided 95 % interval of the difference, which lies within -1..1 even for a single item
    high: Real
    right_to_wrong: Count
    wrong_to_right: Count
    answers_changed: Count
    mcnemar_p: Real  # exact, one-sided: the candidate is worse
    smallest_drop: Real  # drop that this many items could have caught, at the gate's alpha and 80 % power
    flips: tuple[Flip, ...]  # the first few, for reading

    @model_validator(mode="after")
    def _counts_agree(self) -> "TaskResult":
        if self.right_to_wrong + self.wrong_to_right > self.items or self.answers_changed > self.items:
            raise ValueError("more answers changed than there are items")
        lost = sum(flip.was_right for flip in self.flips)
        if lost > self.right_to_wrong or len(self.flips) - lost > self.wrong_to_right:
            raise ValueError("more flips are listed than were counted")
        return self


class TextNoise(Strict):
    """The baseline against itself under another batch size, on one text."""

    name: str
    kl: Real
    log_ratio: Real
    disagreement: Real


class TaskNoise(Strict):
    """The same for one task: answers that flipped, out of `items`."""

    name: str
    items: Items
    flips: Count

    @model_validator(mode="after")
    def _counts_agree(self) -> "TaskNoise":
        if self.flips > self.items:
            raise ValueError("more flips than items")
        return self


class NoiseFloor(Strict):
    """Nothing below these is called a difference."""

    batch_sizes: tuple[Count, Count]
    texts: tuple[TextNoise, ...]
    tasks: tuple[TaskNoise, ...]


class LayerError(Strict):
    """One linear's relative output error on held-out tokens, from the quantizer's own report."""

    module: str
    error: Real


class GateLine(Strict):
    """One requirement and how it came out; a line of `task.*` makes one of these a task.

    `low` and `high` are one-sided bounds of `measured`, each wrong with probability alpha; None where none exists.
    """

    metric: str  # "text.wikitext.ppl_ratio", "task.piqa.accuracy", "tasks.accuracy"
    requirement: str  # "at most 1.05", "loss below 2 points"
    limit: Bound | None = None  # what the bounds are compared with, in the units of `measured`
    measured: Bound | None  # accuracies: candidate minus baseline, a share
    low: Bound | None = None
    high: Bound | None = None
    verdict: Verdict
    p_value: Real | None = None  # that a candidate which meets the requirement looks this bad; after Holm's correction
    reason: str  # one sentence for people
    below_noise: bool = False


class GateResult(Strict):
    """The verdict of the whole, and of each line; `left_out` are metrics of optional lines that were not measured."""

    source: str  # the gate file, or "default"
    alpha: Real
    verdict: Verdict
    lines: tuple[GateLine, ...]
    left_out: tuple[str, ...] = ()


class ServedFacts(Strict):
    """How a candidate ran that was measured as it is served: its cache's dtype, and a line for each kernel."""

    kv_dtype: str
    kernels: tuple[str, ...]


class Machine(Strict):
    """Where it was measured."""

    device: str
    torch: str
    transformers: str
    threads: Count


class Report(Strict):
    """Everything that `report.json` holds."""

    schema_version: Literal[1] = SCHEMA_VERSION
    quantlab: str
    created: str  # ISO 8601, UTC
    machine: Machine
    baseline: ModelFacts
    candidate: ModelFacts
    baseline_from_cache: bool
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
    noise: NoiseFloor | None
    layers: tuple[LayerError, ...]
    gate: GateResult | None
    served: ServedFacts | None = None  # None: the candidate was computed in plain torch, as its file says
    seconds: dict[str, Real]  # stage -> seconds
