"""The log-likelihood of continuations: how probable a model finds some tokens after some others.

Tokens that sequences share are computed once, and logits exist for scored positions alone, a few MB at a time.
Knows nothing about text or tasks.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantlab.errors import NumericsError, UsageError
from quantlab.eval.packing import Batch, batches, pack
from quantlab.eval.scoring import chunk_tokens, chunks, token_nll
from quantlab.models.decoder import CausalLM

Progress = Callable[[int, int], None]  # done, of how many


class Request(NamedTuple):
    """Token ids to score, `continuation`, and those before them, at least one."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """Log-probability of a continuation in nats; its likeliest tokens, each after the true ones before it."""

    logprob: float
    likeliest: tuple[int, ...]


def score(
    model: CausalLM, requests: Sequence[Request], batch_size: int, max_length: int, on_progress: Progress
) -> list[Score]:
    """Score each request, `batch_size` rows at a time; a sequence over `max_length` loses its beginning.

    Raises NumericsError where logits are NaN or infinite, UsageError for a continuation over `max_length` or without
    a token, which would be certain whatever the model.
    """
    check_continuations(requests, max_length)
    # The last token is only predicted, never read; so max_length + 1 tokens fit.
    inputs = [(context + continuation)[-(max_length + 1) : -1] for context, continuation in requests]
    scores: list[Score | None] = [None] * len(requests)
    done = 0
    with torch.inference_mode():
        for batch in batches(pack(inputs), batch_size, model.embed_tokens.weight.device):
            for index, result in _score_batch(model, batch, requests):
                scores[index] = result
                done += 1
            on_progress(done, len(requests))
    found = [result for result in scores if result is not None]
    assert len(found) == len(requests)
    return found


def check_continuations(requests: Sequence[Request], max_length: int) -> None:
    """Raises UsageError for a continuation over `max_length`, or without a token."""
    if not all(request.continuation for request in requests):
        raise UsageError("an answer has no tokens, so there is nothing to score", fix="items without empty answers")
    longest = max((len(request.continuation) for request in requests), default=0)
    if longest > max_length:
        raise UsageError(f"an answer has {longest} tokens, and the model reads {max_length} at once")


def _score_batch(model: CausalLM, batch: Batch, requests: Sequence[Request]) -> list[tuple[int, Score]]:
    """(index, score) of every request in the batch."""
    width = batch.ids.shape[1]
    members = [(row, index, path) for row, held in enumerate(batch.rows) for index, path in held.paths.items()]
    lengths = [len(requests[index].continuation) for _, index, _ in members]
    places = [
        row * width + node
        for (row, _, path), length in zip(members, lengths, strict=True)
        for node in path[len(path) - length :]
    ]
    targets = [token for _, index, _ in members for token in requests[index].continuation]
    device = batch.ids.device
    states = batch.states(model).flatten(0, 1)
    logprobs, likeliest = _read_logits(
        model, states, torch.tensor(places, device=device), torch.tensor(targets, device=device)
    )
    tokens = [tuple(part.tolist()) for part in likeliest.cpu().split(lengths)]
    parts = logprobs.cpu().split(lengths)
    return [
        (index, Score(math.fsum(part.tolist()), chosen))
        for (_, index, _), part, chosen in zip(members, parts, tokens, strict=True)
    ]


def _read_logits(model: CausalLM, states: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] fp64 of targets: [n] and the likeliest tokens [n] at places: [n] of states: [m, hidden]."""
    unique, inverse = places.unique(return_inverse=True)
    logprobs = torch.empty(len(places), dtype=torch.float64, device=states.device)
    likeliest = torch.empty_like(unique)
    for chunk in chunks(len(unique), chunk_tokens(model.config.vocab_size, states.device)):
        logits = model.logits(states[unique[chunk]])
        inside = (inverse >= chunk.start) & (inverse < chunk.stop)
        logprobs[inside] = -token_nll(logits[inverse[inside] - chunk.start], targets[inside])
        likeliest[chunk] = logits.argmax(-1)
    if not logprobs.isfinite().all():
        raise NumericsError("the model's logits are NaN or infinite", fix="--dtype float32, or another recipe")
    return logprobs, likeliest[inverse]
