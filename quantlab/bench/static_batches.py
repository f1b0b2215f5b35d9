"""The yardstick of continuous batching: transformers' `generate` on padded batches, one after the other.

Each batch goes on until its longest answer has ended, as a plain loop must; tokens beyond what a request asked for are
computed and not counted. Knows nothing about our engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM

Asked = tuple[list[int], int]  # prompt token ids, tokens of the answer


@dataclass(frozen=True, slots=True)
class StaticRun:
    """Seconds of the whole loop and the tokens that somebody asked for."""

    seconds: float
    output_tokens: int
    computed_tokens: int

    @property
    def rate(self) -> float:
        """Asked tokens a second."""
        return self.output_tokens / self.seconds


def run_static(folder: Path, asked: Sequence[Asked], batch: int, dtype: torch.dtype) -> StaticRun:
    """Answer all requests in batches of `batch`, in the order of their arrival, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, local_files_only=True)
    pad = model.config.pad_token_id or 0
    _batch(model, asked[:2], pad, limit=2)  # warm up
    begin = perf_counter()
    computed = sum(_batch(model, asked[start : start + batch], pad) for start in range(0, len(asked), batch))
    return StaticRun(perf_counter() - begin, sum(count for _, count in asked), computed)


def _batch(model: torch.nn.Module, asked: Sequence[Asked], pad: int, limit: int | None = None) -> int:
    """One batch, padded on the left; the number of tokens that were computed."""
    width = max(len(ids) for ids, _ in asked)
    count = limit or max(count for _, count in asked)
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in asked])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in asked])
    with torch.inference_mode():
        made = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=pad
        )
    return int(made.shape[0] * (made.shape[1] - width))
