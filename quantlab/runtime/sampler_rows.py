"""The settings of the sequences that sample in one step, as tensors on the device, and what they do to scores.

A plan is built when the rows change and used until they change again; a step uploads one random number a row at most.
Knows nothing about seeds, grammars or what was sampled.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.runtime.distribution import NucleusFloor, keep_likely, keep_top_k
from quantlab.runtime.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Row:
    """One sampling sequence: its settings and its slot."""

    params: SamplingParams
    slot: int


@dataclass(frozen=True, slots=True)
class Penalties:
    """rows, slots: [R] int64; the rest [R, 1] fp32."""

    rows: Tensor
    slots: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


@dataclass(frozen=True, slots=True)
class Filters:
    """rows: [R] int64; top_k: [R] int64, None when no row asks, as for top_p, min_p: [R] fp32."""

    rows: Tensor
    top_k: Tensor | None
    greatest_k: int
    top_p: Tensor | None
    min_p: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rows of a step ask for; None where no row asks.

    slots: [S] int64; greedy: [S] bool; inverse_temperature: [S, 1] fp32; bias: flat places in the scores int64 and
    values fp32; blocked: flat places. `random` rows are those that are not greedy, by index.
    """

    slots: Tensor
    random: tuple[int, ...]
    greedy: Tensor | None
    inverse_temperature: Tensor | None
    penalties: Penalties | None
    filters: Filters | None
    bias: tuple[Tensor, Tensor] | None
    blocked: Tensor | None

    @property
    def changes_scores(self) -> bool:
        """Whether any row's likeliest token may be another than the model's."""
        return self.penalties is not None or self.bias is not None or self.blocked is not None


@dataclass(frozen=True, slots=True)
class History:
    """What each slot's text holds, for penalties: output counts [N, P] int32 and tokens of the prompt [N, P] bool."""

    counts: Tensor
    prompt: Tensor


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is always taken."""
    return params.temperature == 0.0


def is_penalised(params: SamplingParams) -> bool:
    """Whether the sequence's own text changes its scores."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def is_filtered(params: SamplingParams) -> bool:
    """Whether some tokens are left out of the draw."""
    return not is_greedy(params) and bool(params.top_k or params.top_p < 1.0 or params.min_p)


def upload(values: Ordered[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def make_plan(rows: Ordered[Row], early: Mapping[int, Ordered[int]], width: int, device: torch.device) -> Plan:
    """The plan for `rows` over scores [S, width]; `early` are the tokens that may not come yet in some rows."""
    random = tuple(i for i, row in enumerate(rows) if not is_greedy(row.params))
    mixed = 0 < len(random) < len(rows)
    bias = [(i * width + token, value) for i, row in enumerate(rows) for token, value in row.params.logit_bias]
    blocked = [i * width + token for i, tokens in early.items() for token in tokens]
    return Plan(
        slots=upload([row.slot for row in rows], torch.int64, device),
        random=random,
        greedy=upload([is_greedy(row.params) for row in rows], torch.bool, device) if mixed else None,
        inverse_temperature=_temperatures(rows, device) if random else None,
        penalties=_penalties(rows, device),
        filters=_filters(rows, device),
        bias=(
            (upload([at for at, _ in bias], torch.int64, device), upload([v for _, v in bias], torch.float32, device))
            if bias
            else None
        ),
        blocked=upload(blocked, torch.int64, device) if blocked else None,
    )


def _temperatures(rows: Ordered[Row], device: torch.device) -> Tensor | None:
    """None when every temperature is 1. A temperature too small for fp32 acts as the least that is not."""
    inverse = [1.0 if is_greedy(row.params) else min(1.0 / row.params.temperature, 1e38) for row in rows]
    return None if set(inverse) == {1.0} else upload(inverse, torch.float32, device)[:, None]


def _penalties(rows: Ordered[Row], device: torch.device) -> Penalties | None:
    asking = [(i, row) for i, row in enumerate(rows) if is_penalised(row.params)]
    if not asking:
        return None
    settings = [
        (row.params.repetition_penalty, row.params.presence_penalty, row.params.frequency_penalty) for _, row in asking
    ]
    repetition, presence, frequency = upload(settings, torch.float32, device).T[:, :, None]
    index = upload([(i, row.slot) for i, row in asking], torch.int64, device).T
    return Penalties(index[0], index[1], repetition, presence, frequency)


def _filters(rows: Ordered[Row], device: torch.device) -> Filters | None:
    asking = [(i, row.params) for i, row in enumerate(rows) if is_filtered(row.params)]
    if not asking:
        return None
    top_k = [params.top_k for _, params in asking]
    top_p, min_p = upload([(params.top_p, params.min_p) for _, params in asking], torch.float32, device).T
    return Filters(
        rows=upload([i for i, _ in asking], torch.int64, device),
        top_k=upload(top_k, torch.int64, device) if any(top_k) else None,
        greatest_k=max(top_k),
        top_p=top_p if any(params.top_p < 1 for _, params in asking) else None,
        min_p=min_p if any(params.min_p for _, params in asking) else None,
    )


def change_scores(scores: Tensor, plan: Plan, history: History) -> None:
    """Bias, penalties and blocked tokens, in place and in this order (that of transformers and vLLM).

    scores: [S, P] fp32. The repetition penalty is that of Keskar et al. 2019, over prompt and output; presence and
    frequency are OpenAI's, over the output.
    """
    flat = scores.view(-1)
    if plan.bias is not None:
        flat.index_add_(0, *plan.bias)
    if plan.penalties is not None:
        _penalise(scores, plan.penalties, history)
    if plan.blocked is not None:
        flat.index_fill_(0, plan.blocked, -torch.inf)


def _penalise(scores: Tensor, penalties: Penalties, history: History) -> None:
    some = scores.index_select(0, penalties.rows)
    counts = history.counts.index_select(0, penalties.slots)
    written = counts > 0
    seen = history.prompt.index_select(0, penalties.slots) | written
    repeated = torch.where(some > 0, some / penalties.repetition, some * penalties.repetition)
    some = torch.where(seen, repeated, some)
    some -= penalties.frequency * counts
    some -= penalties.presence * written
    scores.index_copy_(0, penalties.rows, some)


def filter_scores(scores: Tensor, filters: Filters, nucleus_floor: NucleusFloor) -> None:
    """Leave out, in place, what top-k, top-p and min-p leave out, in this order (that of transformers).

    scores: [S, P] fp32, divided by the temperature, each row's greatest 0.
    """
    every = len(filters.rows) == len(scores)
    some = scores if every else scores.index_select(0, filters.rows)
    if filters.top_k is not None:
        keep_top_k(some, filters.top_k, filters.greatest_k)
    if filters.top_p is not None or filters.min_p is not None:
        keep_likely(some, filters.top_p, filters.min_p, nucleus_floor)
    if not every:
        scores.index_copy_(0, filters.rows, some)
