"""How many tokens fit, and which wishes are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.checkpoint.model_folder import open_model
from quantlab.errors import UsageError
from quantlab.models.config import ModelConfig
from quantlab.runtime import sizes
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.sizes import Sizes, block_bytes, limits_of, sizes_of

CPU = (torch.device("cpu"), torch.float32)


@pytest.fixture
def config(books_5m: Path) -> ModelConfig:
    return open_model(books_5m).config


def decide(config: ModelConfig, options: EngineOptions) -> Sizes:
    return sizes_of(options, limits_of(options, config, CPU[0]), config, CPU)


def test_stated_memory_is_used_to_the_last_block(config: ModelConfig) -> None:
    block = block_bytes(config, 16, torch.float32, int8=False)
    assert block == 2 * 4 * 2 * 16 * 64 * 4  # keys and values, layers, heads, tokens, channels, bytes
    decided = decide(config, EngineOptions(kv_memory=130 * block + 1, max_model_len=100))
    assert (decided.num_blocks, decided.max_model_len, decided.max_blocks) == (130, 100, 7)


@pytest.mark.parametrize(("device", "asked", "wanted"), [("cpu", None, 16), ("cuda", None, 128), ("cuda", 32, 32)])
def test_a_gpu_has_larger_blocks_unless_it_is_told_otherwise(
    config: ModelConfig, device: str, asked: int | None, wanted: int
) -> None:
    assert limits_of(EngineOptions(block_size=asked), config, torch.device(device)).block_size == wanted


def test_int8_blocks_hold_codes_and_scales(config: ModelConfig) -> None:
    assert block_bytes(config, 16, torch.bfloat16, int8=True) == 2 * 4 * 2 * 16 * (64 + 4)


def test_an_open_length_shrinks_to_what_fits_and_a_stated_one_is_refused(config: ModelConfig) -> None:
    memory = 10 * block_bytes(config, 16, torch.float32, int8=False)
    assert decide(config, EngineOptions(kv_memory=memory)).max_model_len == 160
    with pytest.raises(UsageError, match="hold 160 tokens, not 200"):
        decide(config, EngineOptions(kv_memory=memory, max_model_len=200))


def test_measured_memory_is_not_taken_beyond_what_all_sequences_need(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "free_memory", lambda device: 1 << 40)
    assert decide(config, EngineOptions(max_num_seqs=3, max_model_len=100)).num_blocks == 3 * 7
    monkeypatch.setattr(sizes, "free_memory", lambda device: 0)
    with pytest.raises(UsageError, match="hold 0 tokens"):
        decide(config, EngineOptions())


def test_the_control_group_bounds_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(sizes, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(sizes, "CGROUP", tmp_path)
    assert sizes.free_memory(CPU[0]) == 8000 * 1024
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert sizes.free_memory(CPU[0]) == 4_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert sizes.free_memory(CPU[0]) == 8000 * 1024


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(block_size=8),
        EngineOptions(block_size=24),
        EngineOptions(max_num_seqs=5000),
        EngineOptions(max_batch_tokens=1 << 21),
        EngineOptions(max_model_len=4096),
        EngineOptions(max_model_len=-1),
    ],
)
def test_what_cannot_be_is_refused_by_name(config: ModelConfig, options: EngineOptions) -> None:
    with pytest.raises(UsageError, match="--"):
        raise_with_place(config, options)


def raise_with_place(config: ModelConfig, options: EngineOptions) -> None:
    try:
        limits_of(options, config, CPU[0])
    except UsageError as error:
        raise UsageError(error.one_line()) from error


def test_a_rotation_that_depends_on_length_is_served_up_to_where_it_does(config: ModelConfig) -> None:
    rope = replace(config.rope, type="dynamic", factor=2.0, max_position=64)
    limits = limits_of(EngineOptions(), replace(config, rope=rope), CPU[0])
    assert limits.max_model_len == 64
