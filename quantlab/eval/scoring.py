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

    Raises NumericsError where logits are NaN or infinite. With e = exp(a - max a), s = sum e for logits a of the
    baseline and the same for b of the candidate, KL is sum e_a (a - b) / s_a - (lse_a - lse_b): differences of logits
    are taken before the large, equal parts of the log-probabilities could round them.
    """
    a, b = baseline.float(), candidate.to(baseline.device).float()
    lse_a, first_a, exp_a, sum_a = _normalizer(a)
    lse_b, first_b, _, _ = _normalizer(b)
    _check_finite(lse_a, "baseline's")
    _check_finite(lse_b, "candidate's")
    right = targets.to(a.device)[:, None]
    nll_a, nll_b = (lse - x.gather(-1, right)[:, 0].double() for lse, x in ((lse_a, a), (lse_b, b)))
    kl = exp_a.mul_(a - b).sum(-1).double() / sum_a - (lse_a - lse_b)
    _check_finite(kl, "models'")  # single infinite logits do not show in the sums
    return TokenScores(nll_a, nll_b, kl.clamp_(min=0.0), first_a == first_b, (-nll_b).exp() - (-nll_a).exp())


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats: logits: [n, V] floating, targets: [n] int64 -> [n] fp64."""
    x = logits.float()
    return _normalizer(x)[0] - x.gather(-1, targets.to(x.device)[:, None])[:, 0].double()


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at once."""
    values = CPU_VALUES if device.type == "cpu" else GPU_VALUES
    return max(MIN_CHUNK, values // vocabulary)


def chunks(count: int, size: int) -> Iterator[slice]:
    """[0, count) in slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _normalizer(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: [n, V] fp32 -> log sum exp [n] fp64, index of the maximum [n], exp(x - max) [n, V] fp32, its sums [n] fp64."""
    top, first = x.max(-1, keepdim=True)
    exps = (x - top).exp_()
    sums = exps.sum(-1).double()
    return top[:, 0].double() + sums.log(), first[:, 0], exps, sums


def _check_finite(lse: Tensor, who: str) -> None:
    if not torch.isfinite(lse).all():
        raise NumericsError(f"the {who} logits are NaN or infinite", fix="--dtype float32, or another recipe")
