"""How close a quantized model stays to its 16-bit self: perplexity, KL divergence, top-1 agreement.

Protocol: tokens cut into disjoint windows, the tail dropped, every token of a window but its first scored.
Knows nothing about files, schemes or how the candidate was made.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlab.errors import UsageError
from quantlab.eval.scoring import chunk_tokens, score_chunk, token_nll
from quantlab.models.decoder import CausalLM
from quantlab.text import Tokenizer

WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A candidate against its baseline over `tokens` scored tokens.

    `kl` is the mean KL(baseline || candidate) in nats per token, `agreement` the share of tokens at which both put the
    same token first.
    """

    tokens: int
    baseline_perplexity: float
    perplexity: float
    kl: float
    agreement: float

    @property
    def ratio(self) -> float:
        """Candidate's perplexity over the baseline's; 1.0 is lossless."""
        return self.perplexity / self.baseline_perplexity


def cut_windows(ids: Tensor, window: int) -> Tensor:
    """ids: [T] -> [T // window, window], the tail dropped. Raises UsageError when not even one window fits."""
    count = len(ids) // window
    if count == 0:
        raise UsageError(f"the evaluation text holds {len(ids)} tokens, one window needs {window}")
    return ids[: count * window].view(count, window)


def read_ids(paths: Sequence[Path], tokenizer: Tokenizer, limit: int | None = None) -> Tensor:
    """The first `limit` token ids of the files' text end to end: [T] int64. Raises UsageError on an unreadable file."""
    try:
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the evaluation text: {error}") from error
    ids: list[int] = []
    for piece in tokenizer.encode_pieces(text):
        ids += piece
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)


def perplexity(model: CausalLM, ids: Tensor, window: int = WINDOW) -> float:
    """exp of the mean negative log likelihood of ids: [T] int64 under the protocol above."""
    windows, total = cut_windows(ids, window), 0.0
    with torch.inference_mode():
        for row in windows:
            for logits, targets in zip(_logits(model, row), _targets(model, row), strict=True):
                total += token_nll(logits, targets).sum().item()
    return math.exp(total / (len(windows) * (window - 1)))


def compare(baseline: CausalLM, candidate: CausalLM, ids: Tensor, window: int = WINDOW) -> Fidelity:
    """`candidate` against `baseline` on ids: [T] int64, in one pass."""
    return compare_many(baseline, [candidate], ids, window)[0]


def compare_many(
    baseline: CausalLM, candidates: Sequence[CausalLM], ids: Tensor, window: int = WINDOW
) -> list[Fidelity]:
    """Each candidate against `baseline` on ids: [T] int64; the baseline runs once. All share one vocabulary."""
    windows = cut_windows(ids, window)
    sums = torch.zeros(len(candidates), 4, dtype=torch.float64)
    with torch.inference_mode():
        for row in windows:
            streams = [_logits(model, row) for model in (baseline, *candidates)]
            for targets, reference, *others in zip(_targets(baseline, row), *streams, strict=True):
                for index, logits in enumerate(others):
                    sums[index] += _chunk_sums(reference, logits, targets)
    scored = len(windows) * (window - 1)
    return [_fidelity(row.tolist(), scored) for row in sums / scored]


def _fidelity(means: list[float], scored: int) -> Fidelity:
    baseline_nll, nll, kl, agreement = means
    return Fidelity(scored, math.exp(baseline_nll), math.exp(nll), kl, agreement)


def _chunk_sums(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a chunk: baseline nll, candidate nll, KL, agreements; logits: [n, V] each, targets: [n] -> [4] fp64."""
    scores = score_chunk(reference, logits, targets)
    columns = (scores.baseline_nll, scores.nll, scores.kl, scores.agree)
    return torch.stack([column.sum(dtype=torch.float64) for column in columns]).cpu()


def _logits(model: CausalLM, row: Tensor) -> Iterator[Tensor]:
    """The logits that score row: [window], in chunks of a few MB: [n, V] each."""
    device = model.embed_tokens.weight.device
    hidden = model.hidden(row[None].to(device))[0, :-1]
    for chunk in hidden.split(_chunk_tokens(model)):
        yield model.logits(chunk)


def _targets(model: CausalLM, row: Tensor) -> tuple[Tensor, ...]:
    return row[1:].split(_chunk_tokens(model))


def _chunk_tokens(model: CausalLM) -> int:
    return chunk_tokens(model.embed_tokens.num_embeddings, model.embed_tokens.weight.device)
