"""All decoder blocks in order, streamed: one in memory, each durable in the journal before the next is read.

Knows nothing about how a block is quantized; a finished block is replayed, bit for bit, from its codes.
"""

import time
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor
from torch.nn.functional import embedding

from quantlab.checkpoint.reader import TORCH_DTYPES, TensorReader
from quantlab.events import BlockDone, Notice, RunStarted, StepDone
from quantlab.models.decoder import build_block
from quantlab.models.naming import EMBEDDING, block_linear_shapes, block_prefix, block_tensor_shapes
from quantlab.quant.amounts import compared_samples
from quantlab.quant.block_task import BlockTask, install
from quantlab.quant.blockwise import Streams, quantize_block
from quantlab.quant.head import HEAD_STEP, quantize_head
from quantlab.quant.journal import Journal
from quantlab.quant.parts import Parts, part_tensors
from quantlab.quant.rounding import learn_rounding
from quantlab.quant.setup import Setup
from quantlab.quant.stages import Stream
from quantlab.recipe import Rounding


class StageClock(Protocol):
    """Counts time under a stage's name."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """A context whose time is counted under `name`."""


def quantize_blocks(setup: Setup, journal: Journal, clock: StageClock) -> list[str]:
    """Quantize every block, and lm_head where it has a scheme; returns the journal's steps in order."""
    layers = setup.config.num_layers
    steps = [block_step(layer) for layer in range(layers)]
    resumed = sum(step in journal.entries for step in steps)
    tokens = 0 if setup.blocks is None else setup.solver_ids.numel()
    later = tuple(p.kind for p in setup.options.recipe.passes if p.kind == "distill")
    setup.listener(RunStarted(layers, resumed, tokens, (*later, "write", "verify")))
    if setup.blocks is not None and len(setup.solver_ids) < len(setup.blocks.ids):
        shown, there = len(setup.solver_ids), len(setup.blocks.ids)
        setup.listener(Notice(f"on a CPU the solver sees {shown} of {there} samples (cpu_samples in the recipe)"))
    if resumed:
        setup.listener(Notice(f"continuing: {resumed} of {layers} blocks are finished"))
    head = setup.schemes.get("lm_head") is not None
    if all(step in journal.entries for step in steps) and (not head or HEAD_STEP in journal.entries):
        return [*steps, HEAD_STEP] if head else steps
    with clock.stage("embed"):
        streams = start_streams(setup)
    for layer, step in enumerate(steps):
        started = time.perf_counter()
        task = _task(setup, layer, streams is not None and streams.exact is not None)
        if step in journal.entries:
            with clock.stage("replay"):
                _replay(task, streams, Parts(journal, [step]))
            setup.listener(StepDone("replay", layer + 1, resumed))
            continue
        with clock.stage("quantize"):
            entry = None if streams is None or not _trained(setup) else streams.quantized.x.clone()
            quantize_block(task, streams)
        if entry is not None and streams is not None:
            with clock.stage("rounding"):
                learn_rounding(task, streams, entry)
        with clock.stage("journal"):
            _record(journal, step, task)
        error = _block_error(task, streams)
        setup.listener(BlockDone(layer, layers, error, time.perf_counter() - started))
    if head:
        with clock.stage("quantize"):
            quantize_head(setup, journal, streams)
        steps.append(HEAD_STEP)
    return steps


def block_step(layer: int) -> str:
    """The journal's name for block `layer`."""
    return f"block-{layer:05d}"


def start_streams(setup: Setup) -> Streams | None:
    """The streams in front of block 0; the embedding is read, used and dropped. None for a recipe without text."""
    if setup.blocks is None:
        return None
    weight = TensorReader(setup.checkpoint).tensor(EMBEDDING)
    x = embedding(setup.solver_ids, weight).float().to(setup.place.device)
    samples = compared_samples(setup.options.recipe, len(x), setup.held_out)
    exact = Stream(x[len(x) - samples :].clone(), setup.config, setup.place) if samples else None
    return Streams(Stream(x, setup.config, setup.place), exact, setup.held_out)


def _trained(setup: Setup) -> bool:
    return any(isinstance(p, Rounding) for p in setup.options.recipe.passes)


def _task(setup: Setup, layer: int, compared: bool) -> BlockTask:
    """The block to quantize, and with `compared` its 16-bit twin, which shares what is not changed."""
    prefix = block_prefix(layer)
    reader = TensorReader(setup.checkpoint)
    weights = {name: reader.tensor(prefix + name) for name in block_tensor_shapes(setup.config)}
    place = setup.place
    block = build_block(setup.config, layer, weights, place.compute, place.device)
    shared = dict(block.state_dict())
    exact = build_block(setup.config, layer, shared, place.compute, place.device) if compared else None
    names = block_linear_shapes(setup.config)
    return BlockTask(
        config=setup.config,
        layer=layer,
        block=block,
        exact=exact,
        schemes={name: setup.schemes[prefix + name] for name in names},
        recipe=setup.options.recipe,
        place=place,
        stored={name: TORCH_DTYPES[setup.checkpoint.tensors[prefix + name].dtype] for name in weights},
        listener=setup.listener,
    )


def _record(journal: Journal, step: str, task: BlockTask) -> None:
    prefix = block_prefix(task.layer)
    solved = {prefix + name: q for name, q in task.solved.items()}
    changed = {prefix + name: tensor for name, tensor in task.changed.items()}
    journal.record(step, part_tensors(solved, changed), {"rows": [row.as_json() for row in task.rows]})


def _replay(task: BlockTask, streams: Streams | None, parts: Parts) -> None:
    """Move the streams through a finished block, rebuilt from its part."""
    if streams is None:
        return
    restore(task, parts)
    streams.quantized.run(task.block, task.layer)
    if streams.exact is not None and task.exact is not None:
        streams.exact.run(task.exact, task.layer)


def restore(task: BlockTask, parts: Parts) -> None:
    """Make task.block the quantized block that `parts` describes."""
    prefix = block_prefix(task.layer)
    for name, parameter in list(task.block.named_parameters()):
        changed = parts.changed(prefix + name)
        if changed is not None:
            parameter.data = changed.to(task.place.device, parameter.dtype)
    for name, scheme in task.schemes.items():
        if scheme is not None:
            q = parts.quantized(prefix + name)
            install(task, name, q.to(task.place.device), scheme)


def _block_error(task: BlockTask, streams: Streams | None) -> float:
    """Squared error of the block's output over its squared output, held out; of its linears where nothing compares."""
    if streams is None or streams.exact is None:
        return sum(row.error for row in task.rows) / max(1, len(task.rows))
    part = slice(-streams.held_out, None)
    wanted: Tensor = streams.exact.x[part]
    return float((streams.quantized.x[part] - wanted).square().sum() / wanted.square().sum())
