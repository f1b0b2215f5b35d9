"""How much an engine can hold: blocks of keys and values, tokens a sequence, sequences and tokens a step.

What the user left open is decided here, from the model and from memory measured once the weights are loaded. Knows
nothing about who uses the blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from quantlab.errors import UsageError
from quantlab.models.config import ModelConfig
from quantlab.runtime.options import EngineOptions
from quantlab.units import human_bytes

# Shares of what is free for keys and values, the rest being for activations and for everybody else.
GPU_SHARE, CPU_SHARE = 0.94, 0.35
# Sequences, tokens a step, tokens a block. A GPU reads larger blocks faster in prefill; a beginning that requests share
# is found in whole blocks.
GPU_DEFAULTS, CPU_DEFAULTS = (256, 2048, 128), (64, 512, 16)
MOST_SEQUENCES, MOST_TOKENS = 4096, 1 << 20
LONGEST_BY_DEFAULT = 131_072
MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limits:
    """What is known before memory is measured: sequences, tokens a step, tokens a sequence, tokens a block."""

    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine is built with; `int8_kv` is whether keys and values are codes with scales."""

    max_num_seqs: int
    max_batch_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    block_bytes: int
    int8_kv: bool

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


def limits_of(options: EngineOptions, config: ModelConfig, device: torch.device) -> Limits:
    """The limits that `options` state or leave to us; raises UsageError for those that cannot be meant."""
    sequences, tokens, block = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    block = block if options.block_size is None else options.block_size
    own = config.max_position_embeddings
    if config.rope.type == "dynamic":
        own = min(own, config.rope.max_position)  # beyond it each length has angles of its own, cached keys included
    if block % 16 or not 16 <= block <= 1024:
        raise UsageError("must be a multiple of 16 up to 1024", where="--block-size", fix="--block-size 16")
    longest = min(own, LONGEST_BY_DEFAULT) if options.max_model_len is None else options.max_model_len
    return Limits(
        _within("--max-num-seqs", sequences if options.max_num_seqs is None else options.max_num_seqs, MOST_SEQUENCES),
        _within(
            "--max-batch-tokens", tokens if options.max_batch_tokens is None else options.max_batch_tokens, MOST_TOKENS
        ),
        _within("--max-model-len", longest, own),
        block,
    )


def sizes_of(
    options: EngineOptions, limits: Limits, config: ModelConfig, where: tuple[torch.device, torch.dtype]
) -> Sizes:
    """The sizes that fit `options.kv_memory` or, without it, a share of what is free on the device now.

    Raises UsageError if a stated `max_model_len` does not fit; a length that was left open shrinks to what does.
    """
    device, dtype = where
    int8 = options.kv_dtype == "int8"
    block = block_bytes(config, limits.block_size, dtype, int8)
    share = GPU_SHARE if device.type == "cuda" else CPU_SHARE
    reserve = step_bytes(config, limits, dtype)
    room = options.kv_memory if options.kv_memory is not None else int(max(0, free_memory(device) - reserve) * share)
    blocks, longest = room // block, limits.max_model_len
    if options.kv_memory is None:
        blocks = min(blocks, limits.max_num_seqs * -(-longest // limits.block_size))
    if blocks * limits.block_size < longest:
        if options.max_model_len is not None or not blocks:
            message = f"{human_bytes(room)} for keys and values hold {blocks * limits.block_size} tokens, not {longest}"
            raise UsageError(message, where="--kv-memory", fix=f"--max-model-len {max(1, blocks * limits.block_size)}")
        longest = blocks * limits.block_size
    return Sizes(limits.max_num_seqs, limits.max_batch_tokens, longest, limits.block_size, blocks, block, int8)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, int8: bool) -> int:
    """Bytes of one block of keys and values in all layers."""
    rows = 2 * config.num_layers * config.num_kv_heads * block_size
    return rows * (config.head_dim + 4 if int8 else config.head_dim * dtype.itemsize)


def step_bytes(config: ModelConfig, limits: Limits, dtype: torch.dtype) -> int:
    """Bytes that the largest step may need besides weights, keys and values."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    token = (4 * config.hidden_size + heads + 3 * config.intermediate_size) * dtype.itemsize
    scores = limits.max_num_seqs * config.vocab_size * (dtype.itemsize + 4 * 4)
    return limits.max_batch_tokens * token + scores + (256 << 20)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device` now; on the CPU within the limit of its control group."""
    if device.type == "cuda":
        # What torch holds and does not use is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _meminfo_available()
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _within(option: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise UsageError(f"{value} is not from 1 to {most}", where=option, fix=f"{option} {min(max(value, 1), most)}")
    return value


def _meminfo_available() -> int:
    """MemAvailable, or a careful guess where the system does not say."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
    except OSError:
        return 4 << 30
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 4 << 30)


def _number(path: Path) -> int | None:
    """The number that a file holds, None where there is none ("max", or no such file)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
