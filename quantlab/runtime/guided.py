"""Sequences that follow a grammar: which tokens each may have next, as a mask on its scores.

Knows grammars by two protocols alone; `grammar` has the ones that there are.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantlab.runtime.batch import Slice
from quantlab.runtime.request import Grammar
from quantlab.runtime.sampler_rows import upload


class Matcher(Protocol):
    """The state of one sequence's grammar."""

    def consume(self, token_ids: Ordered[int]) -> None:
        """Go on by tokens that were sampled."""

    def fill(self, mask: Tensor) -> None:
        """Write which tokens may come next: mask: [ceil(V / 32)] int32 on the host, bit i of word w for 32 w + i."""


class Grammars(Protocol):
    """Makes matchers for one tokenizer (`grammar.TokenGrammars`)."""

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of `grammar`; one that allows nothing if it cannot be compiled."""


class Nothing:
    """The matcher where there are no grammars: no token may come, so the request fails and the engine does not."""

    def consume(self, token_ids: Ordered[int]) -> None:
        """Nothing to remember."""

    def fill(self, mask: Tensor) -> None:
        """No token."""
        mask.zero_()


@dataclass(slots=True)
class _State:
    """A matcher and how many output tokens it has consumed."""

    matcher: Matcher
    consumed: int = 0


class Guided:
    """The grammars of the sequences in slots, for a vocabulary of `vocab_size`."""

    def __init__(self, vocab_size: int, grammars: Grammars | None):
        self._words = -(-vocab_size // 32)
        self._grammars = grammars
        self._states: dict[int, _State] = {}

    def admit(self, slot: int, grammar: Grammar) -> None:
        """Begin `grammar` in `slot`."""
        self._states[slot] = _State(self._grammars.start(grammar) if self._grammars is not None else Nothing())

    def release(self, slot: int) -> None:
        """Forget what is in `slot`, if anything."""
        self._states.pop(slot, None)

    def rows(self, parts: Ordered[Slice]) -> list[int]:
        """Which of `parts` follow a grammar."""
        return [row for row, part in enumerate(parts) if part.sequence.slot in self._states] if self._states else []

    def mask(self, scores: Tensor, rows: Ordered[int], parts: Ordered[Slice]) -> None:
        """Leave to each of `rows` what its grammar allows, in place; all their tokens are known to the host.

        scores: [S, P] fp32.
        """
        device, width = scores.device, scores.shape[1]
        words = torch.zeros(len(rows), width // 32, dtype=torch.int32, pin_memory=device.type == "cuda")
        for mask, row in zip(words, rows, strict=True):
            self._fill(mask[: self._words], parts[row])
        bits = torch.arange(32, dtype=torch.int32, device=device)
        allowed = (words.to(device, non_blocking=True)[:, :, None] >> bits) & 1
        index = upload(rows, torch.int64, device)
        some = scores.index_select(0, index).masked_fill_(allowed.view(len(rows), width) == 0, -torch.inf)
        scores.index_copy_(0, index, some)

    def _fill(self, mask: Tensor, part: Slice) -> None:
        sequence = part.sequence
        assert sequence.slot is not None and part.start + part.count == sequence.length, "its last token is not known"
        state = self._states[sequence.slot]
        state.matcher.consume(sequence.output_ids[state.consumed :])
        state.consumed = len(sequence.output_ids)
        state.matcher.fill(mask)
