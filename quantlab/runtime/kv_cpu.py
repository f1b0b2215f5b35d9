"""Keys and values in blocks of tokens in the CPU's memory, and attention over them.

A block holds `block_size` tokens of all heads, so that a sequence's tokens gathered in order are its keys as they are:
[tokens, KV heads, D]. Only what was written for a sequence is read for it: behind its end may lie another one's NaN,
which no mask would keep out. An INT8 cache keeps codes and a scale for each token and head, widened when gathered.
Knows nothing about who owns which block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantlab.models.attention import attend_causal
from quantlab.models.config import ModelConfig
from quantlab.runtime.step import Step

INT8_MAX = 127.0
# The scale of a row of zeros: any positive number serves.
SMALLEST_ABSMAX = 1e-20


class PagedKV:
    """One layer's keys and values: [blocks, block_size, KV heads, D] each, in `dtype` or INT8 with fp32 scales."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, int8: bool):
        self.dtype = dtype
        self.keys, self.values = (torch.zeros(shape, dtype=torch.int8 if int8 else dtype) for _ in "kv")
        self.scales = tuple(torch.zeros(shape[:3]) for _ in "kv") if int8 else ()

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v: [T, KV heads, D] at slots: [T] int64, block * block_size + place."""
        for side, (pool, x) in enumerate(((self.keys, k), (self.values, v))):
            if self.scales:
                x, scales = quantize_rows(x)
                self.scales[side].flatten(0, 1)[slots] = scales
            pool.flatten(0, 1)[slots] = x

    def read(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at places: [S, n] int64, as in `write`, in `dtype`: two [S, KV heads, n, D]."""
        pools = (self.keys, self.values)
        k, v = (self._read(pool, side, places) for side, pool in enumerate(pools))
        return k, v

    def _read(self, pool: Tensor, side: int, places: Tensor) -> Tensor:
        found = pool.flatten(0, 1).index_select(0, places.reshape(-1))
        if self.scales:
            scales = self.scales[side].flatten(0, 1).index_select(0, places.reshape(-1))
            found = (found.float() * scales[..., None]).to(self.dtype)
        return found.view(*places.shape, *pool.shape[2:]).transpose(1, 2)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to symmetric INT8, as the GPU's cache does: scale = absmax / 127, code = floor(x / scale + 1/2).

    x: [.., D] floating. Returns codes [.., D] int8 and scales [..] fp32.
    """
    x = x.float()
    scales = x.abs().amax(-1).clamp_min(SMALLEST_ABSMAX) / INT8_MAX
    return torch.floor(x / scales[..., None] + 0.5).to(torch.int8), scales


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A slice of several tokens: where it lies among the step's, and where its sequence's tokens are, [1, n]."""

    begin: int
    end: int
    places: Tensor


@dataclass(frozen=True, slots=True)
class _Group:
    """Slices of one token whose sequences have about the same length: their rows [S], lengths [S], places [S, n].

    Behind the end of a sequence, `places` repeat its last token.
    """

    rows: Tensor
    places: Tensor
    lengths: Tensor

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores: [S, 1, 1, n], 0 for the keys that a query sees and -inf for the others."""
        key = torch.arange(self.places.shape[1])[None, :]
        visible = key < self.lengths[:, None]
        if window is not None:
            visible &= key >= self.lengths[:, None] - window
        return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None, None, :]


class StepAttention:
    """Attention of one step over the pages of any layer; what all layers share is made once."""

    def __init__(self, config: ModelConfig, step: Step, tables: Tensor, block_size: int, dtype: torch.dtype):
        starts, lengths = step.starts.tolist(), step.lengths.tolist()
        self._chunks: list[_Chunk] = []
        groups: dict[int, list[int]] = {}
        for i, (begin, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
            if end - begin == 1:
                groups.setdefault((-(-length // block_size)).bit_length(), []).append(i)
            else:
                places = places_of(tables[step.slots[i : i + 1]], step.lengths[i : i + 1], block_size)
                self._chunks.append(_Chunk(begin, end, places))
        self._groups = [self._group(step, tables, members, block_size) for members in groups.values()]
        windows = set(config.windows)
        self._masks = [{w: group.mask(w, dtype) for w in windows} for group in self._groups]

    def __call__(self, q: Tensor, cache: PagedKV, window: int | None) -> Tensor:
        """q: [T, H, D] of tokens that the cache holds already -> [T, H * D]."""
        out = torch.empty_like(q)
        for group, masks in zip(self._groups, self._masks, strict=True):
            k, v = cache.read(group.places)
            # Heads that share keys are the queries of one head: no copy of the keys for each of them.
            grouped = q[group.rows].unflatten(1, (k.shape[1], -1))
            mixed = scaled_dot_product_attention(grouped, k, v, attn_mask=masks[window])
            out[group.rows] = mixed.flatten(1, 2)
        for chunk in self._chunks:
            k, v = cache.read(chunk.places)
            queries = q[chunk.begin : chunk.end].transpose(0, 1)[None]
            out[chunk.begin : chunk.end] = attend_causal(queries, k, v, window)[0].transpose(0, 1)
        return out.flatten(1)

    @staticmethod
    def _group(step: Step, tables: Tensor, members: list[int], block_size: int) -> _Group:
        index = torch.tensor(members)
        lengths = step.lengths[index].long()
        return _Group(step.starts[index].long(), places_of(tables[step.slots[index]], lengths, block_size), lengths)


def places_of(tables: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Where the tokens of sequences are, block * block_size + place: [S, n] int64 for the longest of n tokens.

    tables: [S, blocks]; lengths: [S]. Shorter sequences repeat their last token.
    """
    lengths = lengths.long()
    token = torch.arange(int(lengths.max())).clamp(max=lengths[:, None] - 1)
    return tables.long().gather(1, token // block_size) * block_size + token % block_size
