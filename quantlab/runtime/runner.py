"""Carries out the scheduler's steps on a model: tokens in, sampled tokens out, nothing read back but these.

Knows nothing about how tokens are scheduled or which device computes them.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantlab.runtime.batch import Batch, Launched, Sampled, Slice
from quantlab.runtime.forward import Operations, hidden_states
from quantlab.runtime.logprobs import LogprobTensors, read_logprobs, token_logprobs
from quantlab.runtime.request import TokenLogprobs
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.step import Step, Wanted, prompt_targets, wanted_rows
from quantlab.runtime.step_builder import StepBuilder
from quantlab.runtime.weights import Weights


@dataclass(frozen=True, slots=True)
class Nothing:
    """A step that samples nothing."""

    def result(self) -> Sampled:
        """No tokens."""
        return Sampled(())


@dataclass(frozen=True, slots=True)
class WithPrompt:
    """A step under way of whose slices some asked for the prompt's log probabilities: (slice, values, tops)."""

    tokens: Launched
    slices: int
    prompts: tuple[tuple[int, LogprobTensors, list[int]], ...]
    wait: Callable[[], object]

    def result(self) -> Sampled:
        """Wait for the step and read back what it sampled and what it says about prompts."""
        sampled = self.tokens.result()
        self.wait()
        values: list[tuple[TokenLogprobs, ...] | None] = [None] * self.slices
        for place, tensors, tops in self.prompts:
            values[place] = read_logprobs(tensors, tops)
        return replace(sampled, prompt_logprobs=tuple(values))


class Graphs(Protocol):
    """Steps that were captured."""

    def run(self, batch: Batch, rows: Items[int]) -> Tensor | None:
        """Logits [R, V] of the tokens `rows`, or None for a batch that was not captured."""


class ModelRunner:
    """Runs steps of one model in the order of their launch."""

    def __init__(self, weights: Weights, operations: Operations, builder: StepBuilder, sampler: Sampler):
        self.weights, self.operations = weights, operations
        self.builder, self.sampler = builder, sampler
        self.graphs: Graphs | None = None

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Begin the step."""
        for slot in batch.released:
            self.sampler.release(slot)
        for sequence in batch.admitted:
            self.sampler.admit(sequence)
        wanted = wanted_rows(batch.slices)
        logits = self.logits(batch, wanted.rows)
        sampling = [part for part in batch.slices if part.samples]
        scores = logits if len(sampling) == len(wanted.rows) else logits[wanted.sampling]
        launched: Launched = self.sampler.launch(scores, batch.slices) if sampling else Nothing()
        return self._with_prompts(launched, batch.slices, logits, wanted) if wanted.prompts else launched

    def logits(self, batch: Batch, rows: Items[int]) -> Tensor:
        """Scores [R, V] of the tokens `rows` of the batch; keys and values of all its tokens are written.

        They are there until the next call.
        """
        replayed = self.graphs.run(batch, rows) if self.graphs is not None else None
        return replayed if replayed is not None else self.forward(self.builder.build(batch, rows))

    def forward(self, step: Step) -> Tensor:
        """Scores [R, V] of a step."""
        hidden = hidden_states(self.weights, self.operations, step, self.sampler.last_tokens)
        if not step.rows.shape[0]:  # chunks of prompts alone
            return self.weights.embedding.new_empty(0, self.weights.config.vocab_size)
        return self.weights.head(hidden)

    def _with_prompts(self, launched: Launched, slices: Items[Slice], logits: Tensor, wanted: Wanted) -> Launched:
        prompts = []
        for place, (begin, end) in wanted.prompts.items():
            targets, top = prompt_targets(slices[place])
            ids = torch.tensor(targets, dtype=torch.int64).to(logits.device, non_blocking=True)
            values = token_logprobs(logits[begin:end], ids, top).to_host()
            prompts.append((place, values, [top] * len(targets)))
        return WithPrompt(launched, len(slices), tuple(prompts), _mark(logits.device))


def _mark(device: torch.device) -> Callable[[], object]:
    """Waits until `device` has come as far as it was told by now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
