"""A block run in stages is the block run at once, for every sample, whatever the batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.reader import TensorReader
from quantlab.models.attention import DenseAttention, attend_causal
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import build_block
from quantlab.models.layers import DecoderBlock
from quantlab.models.naming import block_prefix, block_tensor_shapes
from quantlab.models.rope import block_rope
from quantlab.quant.device import Place, choose_place
from quantlab.quant.stages import CalibrationAttention, Stream, attend_in_blocks

CPU32 = Place(torch.device("cpu"), torch.float32)


def load(source: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, DecoderBlock]:
    folder = open_model(source)
    reader = TensorReader(folder.checkpoint)
    weights = {name: reader.tensor(block_prefix(1) + name) for name in block_tensor_shapes(folder.config)}
    return folder.config, build_block(folder.config, 1, weights, dtype, "cpu")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_stages_in_order_equal_the_blocks_forward(family: str, tiny_models: Callable[..., Path]) -> None:
    config, block = load(tiny_models(torch.bfloat16, family))
    x = torch.randn(5, 24, config.hidden_size)
    stream = Stream(x.clone(), config, CPU32)
    widths = []
    for stage in range(4):
        stream.enter(block, 1, stage)
        widths.append(stream.inputs.shape)
        if stage in (1, 3):
            stream.leave(block, stage)
    rope = block_rope(config, 1, torch.arange(24), "cpu")
    assert torch.allclose(stream.x, block(x, rope, DenseAttention(config.layer_window(1))), rtol=1e-5, atol=1e-5)
    assert widths == [(5, 24, 64), (5, 24, 64), (5, 24, 64), (5, 24, 96)]


def test_running_through_equals_stage_by_stage_to_the_bit(tiny: Path) -> None:
    """A continued run replays blocks with `run`, an uninterrupted one goes by stages."""
    config, block = load(tiny)
    x = torch.randn(3, 16, config.hidden_size)
    whole, staged = Stream(x.clone(), config, CPU32), Stream(x.clone(), config, CPU32)
    whole.run(block, 1)
    for stage in range(4):
        staged.enter(block, 1, stage)
        if stage in (1, 3):
            staged.leave(block, stage)
    assert torch.equal(whole.x, staged.x)


def test_samples_do_not_see_each_other(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, block = load(tiny)
    x = torch.randn(7, 16, config.hidden_size)
    together = Stream(x.clone(), config, CPU32)
    together.run(block, 1)
    monkeypatch.setattr("quantlab.quant.stages.CPU_MICRO_TOKENS", 32)
    by_two = Stream(x.clone(), config, CPU32)
    assert by_two.batch == 2
    by_two.run(block, 1)
    alone = Stream(x[4:5].clone(), config, CPU32)
    alone.run(block, 1)
    assert torch.allclose(together.x, by_two.x, atol=1e-5)
    assert torch.allclose(together.x[4:5], alone.x, atol=1e-5)


def test_the_stream_changes_in_place_and_lets_go_of_the_inputs(tiny: Path) -> None:
    config, block = load(tiny)
    stream = Stream(torch.randn(2, 16, config.hidden_size), config, CPU32)
    place = stream.x.data_ptr()
    stream.run(block, 1)
    assert stream.x.data_ptr() == place and stream.inputs.numel() == 0


def test_in_bfloat16_the_residual_stays_float32(tiny: Path) -> None:
    config, narrow = load(tiny, torch.bfloat16)
    _, wide = load(tiny)
    x = torch.randn(2, 16, config.hidden_size)
    streams = [Stream(x.clone(), config, place) for place in (CPU32, Place(torch.device("cpu"), torch.bfloat16))]
    for stream, block in zip(streams, (wide, narrow), strict=True):
        stream.enter(block, 1, 3)
        assert stream.inputs.dtype == stream.place.compute
        stream.run(block, 1)
        assert stream.x.dtype == torch.float32
    difference = (streams[0].x - streams[1].x).norm() / (streams[0].x - x).norm()
    assert 1e-4 < difference < 2e-2


def test_a_sliding_window_hides_what_lies_behind_it() -> None:
    q, k, v = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    far = v.clone()
    far[:, :, 0] += 100.0
    windowed = [CalibrationAttention(4)(q, k, values) for values in (v, far)]
    assert torch.equal(windowed[0][:, :, 4:], windowed[1][:, :, 4:])
    assert not torch.equal(CalibrationAttention()(q, k, v)[:, :, 4:], CalibrationAttention()(q, k, far)[:, :, 4:])
    assert CalibrationAttention()(q.bfloat16(), k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 4, 1), (4, 2, 128), (6, 2, 300)])
def test_attention_in_blocks_is_causal_attention(heads: int, kv_heads: int, tokens: int) -> None:
    q, k, v = (torch.randn(2, tokens, h, 16).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    wanted = attend_causal(q, k, v, None)
    assert torch.allclose(attend_in_blocks(q, k, v), wanted, atol=1e-5)
    narrow = attend_in_blocks(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert float((narrow - wanted).norm() / wanted.norm()) < 0.02


def test_only_a_bfloat16_checkpoint_is_run_in_bfloat16() -> None:
    assert choose_place("cpu", torch.float16).compute == torch.float32
    assert choose_place("cpu", torch.float32).compute == torch.float32
    native = torch.cpu._is_avx512_bf16_supported()
    assert choose_place("cpu", torch.bfloat16).compute == (torch.bfloat16 if native else torch.float32)
