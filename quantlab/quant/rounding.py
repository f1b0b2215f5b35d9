"""Learned rounding: a block's codes and scales trained so that its output matches the 16-bit block's.

The reconstruction of AdaRound and BRECQ (arXiv 2004.10568, 2102.05426) with a straight-through estimator on codes that
GPTQ has already placed. Knows nothing about files or other blocks.
"""

import torch
from torch import Tensor

from quantlab.events import Notice, StepDone
from quantlab.models.layers import DecoderBlock
from quantlab.models.rope import block_rope
from quantlab.quant.block_task import BlockTask, bias_of, install
from quantlab.quant.blockwise import Streams
from quantlab.quant.distill import TrainedLinear, rate_at
from quantlab.quant.stages import CalibrationAttention
from quantlab.recipe import Rounding


def learn_rounding(task: BlockTask, streams: Streams, entry: Tensor) -> None:
    """Train task's codes on its output error, and keep them if held-out samples agree; moves the quantized stream.

    entry: [S, T, hidden] fp32, what entered the block through the quantized blocks before it.
    """
    assert streams.exact is not None
    how = next(p for p in task.recipe.passes if isinstance(p, Rounding))
    wanted, held_out = streams.exact.x, streams.held_out
    before = (streams.quantized.x[-held_out:] - wanted[-held_out:]).square().mean()
    untrained = dict(task.solved)
    trained = _make_trainable(task)
    _train(task, trained, (entry[:-held_out], wanted[:-held_out]), how)
    for name, linear in trained.items():
        _install(task, name, linear)
    reached = streams.quantized.x
    streams.quantized.x = entry
    streams.quantized.run(task.block, task.layer)
    after = (streams.quantized.x[-held_out:] - wanted[-held_out:]).square().mean()
    if not bool(after < before):
        task.listener(Notice(f"block {task.layer}: learned rounding did not help held-out blocks and is dropped"))
        for name, q in untrained.items():
            scheme = task.schemes[name]
            assert scheme is not None
            install(task, name, q, scheme)
        streams.quantized.x = reached


def _make_trainable(task: BlockTask) -> dict[str, TrainedLinear]:
    trained = {}
    for name, q in task.solved.items():
        scheme, parent = task.schemes[name], task.block.get_submodule(name.rpartition(".")[0])
        assert scheme is not None
        trained[name] = TrainedLinear(q, bias_of(task.block.get_submodule(name)), scheme).to(task.place.device)
        setattr(parent, name.rpartition(".")[2], trained[name])
    return trained


def _install(task: BlockTask, name: str, linear: TrainedLinear) -> None:
    scheme = task.schemes[name]
    assert scheme is not None
    install(task, name, linear.quantized(), scheme)


def _train(task: BlockTask, trained: dict[str, TrainedLinear], data: tuple[Tensor, Tensor], how: Rounding) -> None:
    entry, wanted = data
    groups = [
        {"params": [linear.latent for linear in trained.values()], "lr": how.code_rate},
        {"params": [linear.drift for linear in trained.values()], "lr": how.scale_rate},
    ]
    peaks = (how.code_rate, how.scale_rate)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    energy = wanted.square().mean()
    order = torch.Generator().manual_seed(task.layer)
    for step in range(how.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_at(step, how.steps)
        picked = torch.randperm(len(entry), generator=order)[: how.batch_size].to(entry.device)
        loss = (block_output(task, task.block, entry[picked]) - wanted[picked]).square().mean() / energy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            task.listener(StepDone(f"rounding {task.layer}", step + 1, how.steps, float(loss.detach())))


def block_output(task: BlockTask, block: DecoderBlock, x: Tensor) -> Tensor:
    """The block's output for x: [B, T, hidden], differentiable."""
    rope = block_rope(task.config, task.layer, torch.arange(x.shape[1]), task.place.device)
    with task.place.forward():
        return block(x, rope, CalibrationAttention(task.config.layer_window(task.layer)))
