"""Log probabilities of tokens and of the likeliest ones: of the model's own distribution, before any setting.

Device work in `token_logprobs`, host work in `read_logprobs`, so that a runner can do one without waiting for the
other. Knows nothing about requests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.runtime.request import TokenLogprobs

ROWS_AT_ONCE = 64  # rows in fp32 at once: 33 MB at a vocabulary of 128256


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """values: [T, 1 + n] fp32, the token's own ln p and the n likeliest; ids: [T, 1 + n] int64, rank and their ids."""

    values: Tensor
    ids: Tensor

    def to_host(self) -> "LogprobTensors":
        """The same in pinned memory, valid once the device has come this far; on a CPU the same tensors."""
        return LogprobTensors(start_copy(self.values), start_copy(self.ids))


def token_logprobs(logits: Tensor, token_ids: Tensor, top: int) -> LogprobTensors:
    """ln p, rank and the `top` likeliest tokens, row by row; for prompts too.

    logits: [T, V] of any float dtype; token_ids: [T] int64. Equal scores share the best rank among them.
    """
    parts = [_some(logits[i : i + ROWS_AT_ONCE], token_ids[i : i + ROWS_AT_ONCE], top) for i in _starts(len(logits))]
    return LogprobTensors(torch.cat([part.values for part in parts]), torch.cat([part.ids for part in parts]))


def _starts(rows: int) -> range:
    return range(0, max(rows, 1), ROWS_AT_ONCE)


def _some(logits: Tensor, token_ids: Tensor, top: int) -> LogprobTensors:
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, token_ids[:, None])
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    best = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    return LogprobTensors(torch.cat([own, best.values], 1), torch.cat([rank, best.indices], 1))


def read_logprobs(tensors: LogprobTensors, tops: list[int]) -> tuple[TokenLogprobs, ...]:
    """One value a row, with the `tops[row]` likeliest tokens of it; `tensors` are on the host and complete."""
    rows = zip(tensors.values.tolist(), tensors.ids.tolist(), tops, strict=True)
    return tuple(
        TokenLogprobs(values[0], ids[0], tuple(zip(ids[1 : top + 1], values[1 : top + 1], strict=True)))
        for values, ids, top in rows
    )


def start_copy(tensor: Tensor) -> Tensor:
    """`tensor` on the host; from a GPU into pinned memory without waiting."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
