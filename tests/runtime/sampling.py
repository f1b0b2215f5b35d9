"""What the sampler's tests share: sequences in slots, their slices, and one step of sampling."""

import torch
from torch import Tensor

from quantlab.runtime.batch import Sampled, Slice
from quantlab.runtime.request import Request, SamplingParams, Sequence
from quantlab.runtime.sampler import Sampler

CPU = torch.device("cpu")


def sequence(
    params: SamplingParams, slot: int, prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = ()
) -> Sequence:
    return Sequence(Request(f"r{slot}", prompt, params), output_ids=list(output), slot=slot)


def next_slice(part: Sequence) -> Slice:
    """The slice after which the next token is sampled, all tokens being known."""
    return Slice(part, part.length - 1, 1, samples=True)


def sampler_with(sequences: list[Sequence], vocab_size: int, slots: int = 8, eos: tuple[int, ...] = ()) -> Sampler:
    sampler = Sampler(vocab_size, slots, CPU, eos)
    for one in sequences:
        sampler.admit(one)
    return sampler


def step(sampler: Sampler, sequences: list[Sequence], logits: Tensor) -> Sampled:
    """Sample once for all and let the sequences go on."""
    sampled = sampler.launch(logits, [next_slice(one) for one in sequences]).result()
    for one, token in zip(sequences, sampled.token_ids, strict=True):
        one.output_ids.append(token)
    return sampled
