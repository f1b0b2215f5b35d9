"""Token sequences packed into rows that share their common beginnings, so that no token is computed twice.

A row is a tree of tokens in preorder: token i sees token j exactly when j <= i < ends[j], that is, when j is i itself
or an ancestor. The choices of a question share the question, and questions share their examples.
Knows nothing about what the sequences say or which of their tokens are scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlab.models.attention import DenseAttention, MaskedAttention
from quantlab.models.decoder import CausalLM

# A longer row shares more, but its tokens also attend to (and mask out) the other branches: at this length that costs
# an eighth of a small model's linears.
ROW_TOKENS = 512
SHARED_PART = 4  # a sequence joins a row if at least 1/4 of it is there already


@dataclass(slots=True)
class Row:
    """One tree: tokens, their positions in their sequences, and the index behind the last descendant of each.

    `paths` maps a sequence's index to the indices of its tokens in this row.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)

    @property
    def branches(self) -> bool:
        """Whether some token must not see all tokens before it."""
        return any(end < len(self.tokens) for end in self.ends)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass, padded on the right: ids, positions and ends are [B, T] int64."""

    rows: list[Row]
    ids: Tensor
    positions: Tensor
    ends: Tensor

    def states(self, model: CausalLM) -> Tensor:
        """The model's states after the final norm: [B, T, hidden]; those of padding mean nothing."""
        config = model.config
        if any(row.branches for row in self.rows):
            masks = {window: MaskedAttention(self.mask(window)) for window in set(config.windows)}
            return model.states(self.ids, self.positions, lambda layer: masks[config.layer_window(layer)])
        return model.states(self.ids, self.positions, lambda layer: DenseAttention(config.layer_window(layer)))

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, T, T] bool, True where a query (third axis) sees a key, no further back than `window` tokens."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        visible = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < self.ends[:, None, :])
        if window is not None:
            visible &= self.positions[:, None, :] > self.positions[:, :, None] - window
        return visible[:, None]


def pack(sequences: Sequence[Sequence[int]], row_tokens: int = ROW_TOKENS) -> list[Row]:
    """Every sequence in exactly one row, rows longest first; a row holds `row_tokens` or twice its longest sequence."""
    rows: list[Row] = []
    before: Sequence[int] = ()
    # Sorted, sequences with a common beginning are neighbours, and each shares most with the one just before it.
    for index in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[index]
        shared = common_start(before, sequence) if rows else 0
        limit = max(row_tokens, 2 * len(sequence))
        fits = bool(rows) and len(rows[-1].tokens) + len(sequence) - shared <= limit
        if not fits or shared * SHARED_PART < len(sequence):
            _close(rows)
            rows.append(Row())
            path: list[int] = []
            shared = 0
        path = _extend(rows[-1], path[:shared], path[shared:], sequence)
        rows[-1].paths[index] = path
        before = sequence
    _close(rows)
    return sorted(rows, key=lambda row: -len(row.tokens))


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def batches(rows: Sequence[Row], size: int, device: torch.device) -> Iterator[Batch]:
    """Rows as `pack` orders them, `size` to a batch or fewer where they are longer than ROW_TOKENS, on `device`."""
    start = 0
    while start < len(rows):
        width = len(rows[start].tokens)
        group = list(rows[start : start + max(1, min(size, size * ROW_TOKENS // width))])
        start += len(group)
        padding = [width - len(row.tokens) for row in group]
        ids = [row.tokens + [0] * pad for row, pad in zip(group, padding, strict=True)]
        positions = [row.positions + [0] * pad for row, pad in zip(group, padding, strict=True)]
        # A padding token sees itself alone: a query without any key would be NaN.
        ends = [row.ends + list(range(len(row.ends) + 1, width + 1)) for row in group]
        yield Batch(group, *(torch.tensor(values, device=device) for values in (ids, positions, ends)))


def _extend(row: Row, kept: list[int], left: list[int], sequence: Sequence[int]) -> list[int]:
    """Put the rest of `sequence` behind the tokens `kept`; those `left` get no more descendants."""
    length = len(row.tokens)
    for index in left:
        row.ends[index] = length
    new = sequence[len(kept) :]
    row.tokens += new
    row.positions += range(len(kept), len(sequence))
    row.ends += [0] * len(new)
    return kept + list(range(length, length + len(new)))


def _close(rows: list[Row]) -> None:
    """Give the tokens of the last row's last sequence their ends."""
    if rows:
        row = rows[-1]
        row.ends = [end or len(row.tokens) for end in row.ends]
