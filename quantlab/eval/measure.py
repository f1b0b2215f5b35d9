"""Passes of models over the windows of a text: final states of one, scores of two, and the noise of one against itself.

Knows nothing about files or caches: where the baseline's states come from is the caller's affair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.eval.protocol import Windows
from quantlab.eval.scoring import TokenScores, chunk_tokens, chunks, score_chunk
from quantlab.models.decoder import CausalLM

States = Callable[[range], Tensor]  # indices of rows alike, L of each scored -> [rows * L, hidden]
Tick = Callable[[int, int], None]  # windows done, windows in all
NOISE_TOKENS = 16_384  # enough to see which digits are noise, at a few per cent of the time


@dataclass(frozen=True, slots=True)
class Side:
    """One model on one text: its final states by rows, and what makes logits of them."""

    states: States
    head: Callable[[Tensor], Tensor]


def model_side(model: CausalLM, windows: Windows) -> Side:
    """The side of a model that runs whenever its states are asked for."""
    return Side(lambda rows: final_states(model, windows, rows), model.lm_head)


def final_states(model: CausalLM, windows: Windows, rows: Sequence[int]) -> Tensor:
    """States after the final norm wherever a token of B rows alike is scored: [B * length, hidden]."""
    ids = torch.stack([windows.rows[index][:-1] for index in rows]).to(model.embed_tokens.weight.device)
    with torch.inference_mode():
        return model.hidden(ids)[:, -windows.lengths[rows[0]] :].flatten(0, 1)


def score_windows(windows: Windows, baseline: Side, candidate: Side, batch: int, tick: Tick) -> TokenScores:
    """Scores of every token of `windows`, on the CPU; raises NumericsError for logits that are NaN or infinite."""
    parts: list[TokenScores] = []
    for rows in windows.batches(batch):
        states = baseline.states(rows), candidate.states(rows)
        parts.append(score_states(baseline, candidate, *states, windows.targets(rows)))
        tick(rows.stop, len(windows.rows))
    return TokenScores.joined(parts)


def score_states(baseline: Side, candidate: Side, before: Tensor, after: Tensor, targets: Tensor) -> TokenScores:
    """Scores of final states before, after: [n, hidden] against targets: [n] int64, on the CPU."""
    parts: list[TokenScores] = []
    with torch.inference_mode():
        size = chunk_tokens(baseline.head(before[:1]).shape[-1], before.device)
        for part in chunks(len(targets), size):
            scores = score_chunk(baseline.head(before[part]), candidate.head(after[part]), targets[part])
            parts.append(scores.cpu())
    return TokenScores.joined(parts)


def score_noise(model: CausalLM, windows: Windows, baseline: Side, batch: int) -> TokenScores:
    """The first windows of the baseline against itself with twice the batch: what no figure can be told from."""
    live = model_side(model, windows)
    length = windows.lengths[0]
    full = [index for index, other in enumerate(windows.lengths) if other == length]
    full = full[: max(batch, NOISE_TOKENS // length)]
    parts: list[TokenScores] = []
    for start in range(0, len(full), batch):
        rows = range(full[start], full[min(start + batch, len(full)) - 1] + 1)
        # Repeated to fill the other batch, since how many rows run together is all that may differ.
        doubled = (list(rows) * (2 * batch))[: 2 * batch]
        again = final_states(model, windows, doubled)[: len(rows) * length]
        parts.append(score_states(baseline, live, baseline.states(rows), again, windows.targets(rows)))
    return TokenScores.joined(parts)
