"""Whoever answers the requests of tasks: probabilities of continuations, and greedy text.

Knows nothing about tasks, and of models only how they are called.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantlab.eval.generation import Finished, generate
from quantlab.eval.likelihood import Progress, Request, Score, score
from quantlab.models.decoder import CausalLM

# Rows of a task are a tenth of a window of text: so many of them make a forward pass of about the same size.
ROWS_A_WINDOW = 8


class Answers(Protocol):
    """A model that scores and writes, `rows` requests together."""

    @property
    def rows(self) -> int:
        """Requests that it works on together."""

    @property
    def max_length(self) -> int:
        """The most tokens that it reads at once."""

    def score(self, requests: Sequence[Request], on_progress: Progress) -> list[Score]:
        """The log-probability of each continuation; raises NumericsError for logits that are not numbers."""

    def write(self, prompts: Sequence[list[int]], new_tokens: int, finished: Finished) -> list[list[int]]:
        """Each prompt's likeliest next tokens, at most `new_tokens`, until `finished` says so of them."""


@dataclass(frozen=True, slots=True)
class PlainAnswers:
    """A model in plain torch, as its file says."""

    model: CausalLM
    rows: int

    @property
    def max_length(self) -> int:
        """Positions that the model knows."""
        return self.model.config.max_position_embeddings

    def score(self, requests: Sequence[Request], on_progress: Progress) -> list[Score]:
        """As `likelihood.score`: what requests begin with alike is computed once."""
        return score(self.model, requests, self.rows, self.max_length, on_progress)

    def write(self, prompts: Sequence[list[int]], new_tokens: int, finished: Finished) -> list[list[int]]:
        """As `generation.generate`."""
        return generate(self.model, prompts, new_tokens, finished)


def task_rows(windows: int) -> int:
    """Rows of tasks in a forward pass of about the size of `windows` windows of text."""
    return ROWS_A_WINDOW * windows
