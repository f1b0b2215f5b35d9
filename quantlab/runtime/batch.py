"""One step's work, decided by the scheduler and carried out by a runner; integers only, no torch.

Knows nothing about how tokens are scheduled or computed.
"""

from dataclasses import dataclass
from typing import Protocol

from quantlab.runtime.request import Sequence, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of a sequence from position `start`; `samples` when its last token's logits give the next token.

    The token at a position that the host does not know yet (`pending`) is the one that the runner sampled for the
    sequence's slot in the step before.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The slices of one step. `released` slots are free from now; then `admitted` sequences take theirs in this step.

    Sequences that compute one token each, which they or the device know already, come before those that compute a
    prompt. `Sequence.block_ids` is read at the launch: later it may say more, or belong to a later step. A slot may be
    released, and taken again, while a step that sampled for it is not read back yet; what that step gives the old
    owner is dropped.
    """

    step: int
    slices: tuple[Slice, ...]
    admitted: tuple[Sequence, ...] = ()
    released: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(part.count for part in self.slices)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled: a token id per slice with `samples`, in order; logprobs parallel to it where asked for.

    `prompt_logprobs` has, for each slice (parallel to `Batch.slices`) whose request asked for them, those of the
    prompt tokens that follow the slice's positions. `failed` names slices (index, sentence) whose numbers were wrong.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...] | None = None
    failed: tuple[tuple[int, str], ...] = ()


class Launched(Protocol):
    """A step under way."""

    def result(self) -> Sampled:
        """Wait for the step and read back what it sampled."""


class Runner(Protocol):
    """Carries out steps in the order of their launch; a step may be launched before the one before was read back."""

    def launch(self, batch: Batch) -> Launched:
        """Begin the step."""
