"""Two models' logits on the same tokens to a handful of numbers a token: the maths of every figure on text.

Logits come in chunks of a few MB and are gone after them, so the vocabulary and the text may be of any size.
Knows nothing about text, windows of it, or where a model's hidden states come from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import NumericsError

# Values of one chunk of logits: 8 MB in fp32 fill a CPU's matrix product; a GPU wants work for all of its cores.
CPU_VALUES, GPU_VALUES = 1 << 21, 1 << 25
MIN_CHUNK = 16  # tokens: fewer would read the whole output layer for next to nothing


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One number a scored token in each column: [T] fp64, `agree` [T] bool.

    `baseline_nll`, `nll`: negative log likelihood of the right token, in nats; `kl`: KL(baseline || candidate) over the
    whole vocabulary, in nats; `agree`: both put the same token first; `delta_p`: candidate's minus baseline's
    probability of the right token. The definitions are those of llama.cpp's `llama-perplexity --kl-divergence`.
    """

    baseline_nll: Tensor
    nll: Tensor
    kl: Tensor
    agree: Tensor
    delta_p: Tensor

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The columns, in the order of the fields."""
        return self.baseline_nll, self.nll, self.kl, self.agree, self.delta_p

    @classmethod
    def joined(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """The tokens of all parts, in order."""
        return cls(*(torch.cat(columns) for columns in zip(*(part.columns for part in parts), strict=True)))

    def cpu(self) -> "TokenScores":
        """The same on the CPU."""
        return TokenScores(*(column.cpu() for column in self.columns))


def score_chunk(baseline: Tensor, candidate: Tensor, targets: Tensor) -> TokenScores:
    """Scores of logits baseline, candidate: [n, V] floating against targets: [n] int64.

    Raises NumericsError where logits are NaN or infinite. With a the baseline's logits less their largest, b the
    candidate's, s the sum of their exponentials, KL is sum exp(a) (a - b) / s_a - (ln s_a - ln s_b): logits are
    subtracted from each other before the large, equal parts of the log-probabilities could round them.
    """
    a, b = _shift(baseline), _shift(candidate.to(baseline.device))
    _check_finite(a.log_sum, "baseline's")
    _check_finite(b.log_sum, "candidate's")
    kl = a.exps.mul_(a.logits.sub_(b.logits)).sum(-1).double() / a.log_sum.exp() - (a.log_sum - b.log_sum)
    _check_finite(kl, "models'")  # single infinite logits do not show in the sums
    before, after = a.nll(baseline, targets), b.nll(candidate, targets)
    return TokenScores(before, after, kl.clamp_(min=0.0), a.first == b.first, (-after).exp() - (-before).exp())


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats: logits: [n, V] floating, targets: [n] int64 -> [n] fp64."""
    return _shift(logits).nll(logits, targets)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at once."""
    values = CPU_VALUES if device.type == "cpu" else GPU_VALUES
    return max(MIN_CHUNK, values // vocabulary)


def chunks(count: int, size: int) -> Iterator[slice]:
    """[0, count) in slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class _Shifted:
    """Logits less their maximum: [n, V] fp32; its place and value [n]; their exponentials and the log of their sum."""

    logits: Tensor
    first: Tensor
    top: Tensor
    exps: Tensor
    log_sum: Tensor

    def nll(self, raw: Tensor, targets: Tensor) -> Tensor:
        """From the logits as they came: those far below the maximum lose digits when it is subtracted."""
        right = raw.gather(-1, targets.to(raw.device)[:, None])[:, 0].double()
        return self.log_sum + self.top - right.to(self.top.device)


def _shift(raw: Tensor) -> _Shifted:
    x = raw.float()
    top, first = x.max(-1, keepdim=True)
    x = x - top if x is raw else x.sub_(top)
    exps = x.exp()
    return _Shifted(x, first[:, 0], top[:, 0].double(), exps, exps.sum(-1).double().log())


def _check_finite(lse: Tensor, who: str) -> None:
    if not torch.isfinite(lse).all():
        raise NumericsError(f"the {who} logits are NaN or infinite", fix="--dtype float32, or another recipe")
