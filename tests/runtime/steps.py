"""Steps by hand: sequences with blocks of their own, cut into slices without a scheduler."""

from pathlib import Path
from typing import Any

import torch
import transformers

from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.request import Request, SamplingParams, Sequence
from tests.models.conftest import SIZES, randomize


def tiny_model(folder: Path, family: str, flags: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family, three layers, saved by transformers."""
    config = transformers.AutoConfig.for_model(family, **(SIZES | flags))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed=7)
    model.to(dtype).save_pretrained(folder)
    return folder


def sequence(name: str, ids: list[int], blocks: list[int], slot: int, params: SamplingParams | None = None) -> Sequence:
    """A sequence that runs in `slot` and owns `blocks`."""
    request = Request(name, tuple(ids), params or SamplingParams(temperature=0.0))
    return Sequence(request, block_ids=blocks, slot=slot)


def batch(*slices: tuple[Sequence, int, int], admitted: tuple[Sequence, ...] = ()) -> Batch:
    """A step of (sequence, start, count) slices that sample nothing."""
    return Batch(1, tuple(Slice(sequence, start, count, False) for sequence, start, count in slices), admitted)
