"""The serving engine as whoever answers tasks: every request goes through the scheduler, kernels and cache of a server.

Knows nothing about tasks, texts or the baseline.
"""

import math
from collections.abc import Iterator, Sequence

from quantlab.errors import NumericsError
from quantlab.eval.generation import Finished
from quantlab.eval.likelihood import Progress, Request, Score, check_continuations
from quantlab.runtime.engine import Engine
from quantlab.runtime.request import Request as EngineRequest
from quantlab.runtime.request import SamplingParams, TokenEvent, TokenLogprobs

READ = SamplingParams(max_tokens=0, prompt_logprobs=1)


class ServedAnswers:
    """An engine that nobody else uses, asked for the probabilities of prompts and for greedy text."""

    def __init__(self, engine: Engine):
        self._engine = engine

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self._engine.info.max_num_seqs

    @property
    def max_length(self) -> int:
        """One less than the engine's: the last token, which others only predict, is read here too."""
        return self._engine.info.max_model_len - 1

    def score(self, requests: Sequence[Request], on_progress: Progress) -> list[Score]:
        """Each continuation's log-probability, in the rounding of what is served: every request is read by itself.

        Raises NumericsError for logits that are not numbers, UsageError as `likelihood.score` does.
        """
        check_continuations(requests, self.max_length)
        prompts = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in requests]
        scores: list[Score | None] = [None] * len(requests)
        for done, (index, event) in enumerate(self._events(prompts, READ), 1):
            assert event.prompt_logprobs is not None
            scores[index] = _score(event.prompt_logprobs[-len(requests[index].continuation) :])
            on_progress(done, len(requests))
        found = [score for score in scores if score is not None]
        assert len(found) == len(requests)
        return found

    def write(self, prompts: Sequence[list[int]], new_tokens: int, finished: Finished) -> list[list[int]]:
        """Each prompt's greedy text; raises NumericsError for logits that are not numbers."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        rows: list[list[int]] = [[] for _ in prompts]
        left = set(range(len(prompts)))
        for index, event in self._events(prompts, params):
            if index in left:
                rows[index] += event.token_ids
                if event.finish_reason is not None or finished(rows[index]):
                    left.remove(index)
                    self._engine.abort(str(index))
        return rows

    def _events(self, prompts: Sequence[list[int]], params: SamplingParams) -> Iterator[tuple[int, TokenEvent]]:
        """(which prompt, what it got) as the engine comes to it."""
        for index, prompt in enumerate(prompts):
            self._engine.add(EngineRequest(str(index), tuple(prompt), params))
        while self._engine.has_work:
            for event in self._engine.step():
                if event.finish_reason == "error":
                    raise _no_numbers(event.error or "the engine gave a request up")
                yield int(event.request_id), event


def _score(logprobs: Sequence[TokenLogprobs | None]) -> Score:
    """The sum over the tokens of a continuation, and what the model would rather have had at each."""
    known = [found for found in logprobs if found is not None]
    total = math.fsum(found.logprob for found in known)
    if len(known) != len(logprobs) or not math.isfinite(total):
        raise _no_numbers("the model's logits are NaN or infinite")
    return Score(total, tuple(found.top[0][0] for found in known))


def _no_numbers(why: str) -> NumericsError:
    return NumericsError(why, fix="--dtype float32, or another recipe")
