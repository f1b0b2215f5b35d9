"""Learned rounding of a block: it lowers the output's error, and is dropped where held-out samples disagree."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.checkpoint.linear import W8A8Linear
from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.reader import TensorReader
from quantlab.events import Event, Notice
from quantlab.models.decoder import build_block
from quantlab.models.naming import INPUT_GROUPS, block_prefix, block_tensor_shapes
from quantlab.quant.block_task import BlockTask
from quantlab.quant.blockwise import Streams, quantize_block
from quantlab.quant.device import Place
from quantlab.quant.rounding import block_output, learn_rounding
from quantlab.quant.stages import Stream
from quantlab.recipe import Recipe
from quantlab.schemes import Scheme

CPU32 = Place(torch.device("cpu"), torch.float32)
W4, W8 = Scheme("w4a16", 32), Scheme("w8a8", None)
Solved = tuple[BlockTask, Streams, torch.Tensor]


@pytest.fixture
def solve(tiny: Path, events: list[Event]) -> Callable[..., Solved]:
    """solve(scheme, **rounding) -> a block rounded to nearest, its streams behind it, and what entered it."""
    folder = open_model(tiny)
    reader = TensorReader(folder.checkpoint)
    weights = {name: reader.tensor(block_prefix(0) + name) for name in block_tensor_shapes(folder.config)}

    def make(scheme: Scheme, **rounding: float) -> Solved:
        recipe = Recipe(
            scheme=scheme.name,
            group_size=scheme.group_size or "channel",
            passes=[{"pass": "rtn"}, {"pass": "rounding", **rounding}],
        )
        task = BlockTask(
            config=folder.config,
            layer=0,
            block=build_block(folder.config, 0, dict(weights), torch.float32, "cpu"),
            exact=build_block(folder.config, 0, dict(weights), torch.float32, "cpu"),
            schemes={name: scheme for group in INPUT_GROUPS for name in group},
            recipe=recipe,
            place=CPU32,
            stored={name: tensor.dtype for name, tensor in weights.items()},
            listener=events.append,
        )
        hidden = folder.config.hidden_size  # few directions carry most of it, as in a trained model
        x = torch.randn(100, 32, hidden) * torch.logspace(1, -1, hidden) @ torch.randn(hidden, hidden)
        streams = Streams(Stream(x.clone(), folder.config, CPU32), Stream(x.clone(), folder.config, CPU32), 4)
        quantize_block(task, streams)
        return task, streams, x

    return make


def held_out_error(streams: Streams) -> float:
    assert streams.exact is not None
    return float((streams.quantized.x[-4:] - streams.exact.x[-4:]).square().mean())


@pytest.mark.parametrize("scheme", [W4, W8], ids=str)
def test_training_lowers_the_error_on_samples_it_has_not_seen(scheme: Scheme, solve: Callable[..., Solved]) -> None:
    task, streams, entry = solve(scheme, steps=200, batch_size=16, code_rate=0.02, scale_rate=0.0005)
    before, untrained = held_out_error(streams), dict(task.solved)
    learn_rounding(task, streams, entry.clone())
    assert held_out_error(streams) <= (0.8 if scheme is W4 else 1.0) * before
    moved = any(not torch.equal(q.codes, untrained[name].codes) for name, q in task.solved.items())
    assert moved or scheme is W8  # which is so near already that training may find nothing
    for q in task.solved.values():
        assert scheme.code_min <= q.codes.min() and q.codes.max() <= scheme.code_max
        assert q.scales.dtype == torch.bfloat16


def test_the_block_and_the_stream_are_those_of_the_codes_that_are_kept(solve: Callable[..., Solved]) -> None:
    task, streams, entry = solve(W4, steps=60, code_rate=0.02)
    learn_rounding(task, streams, entry.clone())
    assert all(type(task.block.get_submodule(name)) is nn.Linear for name in task.solved)
    again = Stream(entry.clone(), task.config, CPU32)
    again.run(task.block, 0)
    assert torch.equal(again.x, streams.quantized.x)


@pytest.mark.parametrize(("scheme", "kind"), [(W4, nn.Linear), (W8, W8A8Linear)], ids=str)
def test_training_that_does_not_help_is_dropped_and_told(
    scheme: Scheme, kind: type, solve: Callable[..., Solved], events: list[Event]
) -> None:
    task, streams, entry = solve(scheme, steps=30, code_rate=1.0, scale_rate=1.0)  # far too fast
    solved, reached = dict(task.solved), streams.quantized.x.clone()
    learn_rounding(task, streams, entry.clone())
    assert any(isinstance(event, Notice) and "did not help" in event.text for event in events)
    assert all(task.solved[name] is q for name, q in solved.items())
    assert all(type(task.block.get_submodule(name)) is kind for name in solved)
    assert torch.equal(streams.quantized.x, reached)
    again = Stream(entry.clone(), task.config, CPU32)
    again.run(task.block, 0)
    assert torch.equal(again.x, reached)


def test_the_output_that_is_trained_is_the_one_that_is_streamed(solve: Callable[..., Solved]) -> None:
    task, streams, entry = solve(W4, steps=1)
    assert torch.allclose(block_output(task, task.block, entry), streams.quantized.x, atol=1e-5)


def test_the_same_block_trains_to_the_same_codes(solve: Callable[..., Solved]) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        task, streams, entry = solve(W4, steps=20, code_rate=0.02)
        learn_rounding(task, streams, entry.clone())
        found.append(task.solved)
    assert all(torch.equal(found[0][name].codes, found[1][name].codes) for name in found[0])
