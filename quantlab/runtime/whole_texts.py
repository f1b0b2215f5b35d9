"""The serving engine's forward pass on whole texts: the final states of every token, through its kernels and its cache.

What an evaluation asks so that it judges what is served. Knows nothing about requests, sampling or scores.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from quantlab.checkpoint.model_folder import open_model
from quantlab.runtime.backend import Backend, choose_backend
from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.build import runner_of
from quantlab.runtime.forward import hidden_states
from quantlab.runtime.linears import Activations, Linear
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams, Sequence
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sizes import Sizes, block_bytes, limits_of
from quantlab.runtime.source import FolderSource
from quantlab.runtime.weights import build_weights


class WholeTexts:
    """A model that computes up to `max_num_seqs` texts of up to `max_model_len` tokens from their beginning at once."""

    def __init__(self, runner: ModelRunner, sizes: Sizes):
        self._runner, self._sizes = runner, sizes
        # The output layer is called on parts of the states, so they stay in the activations' dtype.
        self._weights = replace(runner.weights, head=_Whole(runner.weights.head))

    @torch.inference_mode()
    def states(self, ids: Tensor) -> Tensor:
        """ids: [B, T] int64 -> states after the final norm: [B, T, hidden] on the model's device."""
        rows, tokens = ids.shape
        assert rows <= self._sizes.max_num_seqs and tokens <= self._sizes.max_model_len
        slices = tuple(self._slice(row, texts) for row, texts in enumerate(ids.tolist()))
        batch = Batch(0, slices, tuple(part.sequence for part in slices))
        step = self._runner.builder.build(batch, range(rows * tokens))
        found = hidden_states(self._weights, self._runner.operations, step, self._runner.sampler.last_tokens)
        assert isinstance(found, Tensor)
        return found.view(rows, tokens, -1)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Which kernel serves which linears, a line each."""
        return self._runner.weights.kernels()

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """states: [n, hidden] -> [n, vocab]."""
        return self._weights.head(states)

    def _slice(self, row: int, ids: Items[int]) -> Slice:
        """All tokens of a text, in blocks that are its own for this step."""
        blocks = self._sizes.max_blocks
        sequence = Sequence(Request(str(row), tuple(ids), SamplingParams()), slot=row)
        sequence.block_ids = list(range(row * blocks, (row + 1) * blocks))
        return Slice(sequence, 0, len(ids), samples=False)


@dataclass(frozen=True, slots=True)
class _Whole:
    """An output layer that takes states as they are, whatever it would rather have."""

    takes_int8: ClassVar[bool] = False
    head: Linear

    @property
    def kernel(self) -> str:
        """What computes it."""
        return self.head.kernel

    @property
    def nbytes(self) -> int:
        """Bytes that one call reads."""
        return self.head.nbytes

    def __call__(self, x: Activations) -> Tensor:
        return self.head(x)


def load_whole_texts(folder: Path, options: EngineOptions, texts: int, tokens: int) -> WholeTexts:
    """The model in `folder` for `texts` texts of `tokens` tokens at once; raises what build_engine raises."""
    model = open_model(folder)
    backend: Backend = choose_backend(options, model.config)
    options = replace(
        options, max_num_seqs=texts, max_model_len=tokens, max_batch_tokens=texts * tokens, cuda_graphs=False
    )
    size = limits_of(options, model.config, backend.device).block_size
    block = block_bytes(model.config, size, backend.dtype, options.kv_dtype == "int8")
    options = replace(options, kv_memory=texts * -(-tokens // size) * block)
    weights = build_weights(FolderSource(model, backend.dtype, backend.device), backend, tokens)
    return WholeTexts(*runner_of(weights, backend, options, (), None))
