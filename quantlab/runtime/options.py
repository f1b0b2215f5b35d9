"""How an engine is to run: what a user may set, as plain values.

Knows nothing about models or devices; what is None is decided when the engine is built.
"""

from dataclasses import dataclass
from typing import Literal

KVDtype = Literal["auto", "int8"]
Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`kv_memory` is bytes for keys and values (None: measured free memory), `max_model_len` the longest sequence in
    tokens (None: the model's own, or what fits), `max_batch_tokens` a step's budget, `block_size` the tokens of a block
    of keys and values (None: what the device likes best), `threads` those of the CPU.
    `int8_head` rounds a 16-bit output layer to INT8 on a GPU: faster for few sequences, and no longer the file's."""

    device: str = "auto"
    dtype: str = "auto"
    kv_dtype: KVDtype = "auto"
    kv_memory: int | None = None
    block_size: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_batch_tokens: int | None = None
    prefix_caching: bool = True
    policy: Policy = "fcfs"
    cuda_graphs: bool = True
    overlap: bool = True
    threads: int | None = None
    int8_head: bool = False


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was built, for the start-up screen, `doctor`, metrics and /v1/models; sizes in bytes, times in seconds.

    `kernels` says in one line each which kernel serves which kind of layer and for how many layers.
    """

    model: str
    architecture: str
    scheme: str
    device: str
    dtype: str
    weight_bytes: int
    kv_dtype: str
    kv_bytes: int
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kernels: tuple[str, ...]
    startup_seconds: float

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.block_size * self.num_blocks

    @property
    def concurrent_at_max_len(self) -> float:
        """Sequences of the longest length that fit at once."""
        return self.kv_tokens / self.max_model_len


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of one engine: gauges of now, counters since the start."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    blocks_free: int = 0
    blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
