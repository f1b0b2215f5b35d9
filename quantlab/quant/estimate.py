"""Peak memory and time of a run, from sizes alone: two documented formulas.

Knows nothing about tensors or files. Both are estimates; what they assume is written where they are computed.
"""

from dataclasses import dataclass

from quantlab.models.config import ModelConfig
from quantlab.models.naming import block_linear_shapes, block_tensor_shapes, tensor_shapes
from quantlab.recipe import Distill, Gptq, Recipe, Rounding

FP32 = 4
# Sustained matrix-multiply rates that the time estimate assumes, in FLOP/s.
CPU_CORE_RATE = 25e9
GPU_RATE = 150e12
# Blocks of weights held at once in fp32: the 16-bit block, its quantized twin, and the solver's copy of one linear.
BLOCK_COPIES = 2.5
# Activation streams held for all calibration tokens: the 16-bit model's and the quantized model's hidden states.
STREAMS = 2
# Square matrices of the widest input held by a solver: Hessian, its factor, and one workspace.
SQUARES = 3
# Tokens in flight through a block at once; the widest intermediate is counted this many times.
MICRO_TOKENS = 4096
INTERMEDIATES = 6


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of the peak, in bytes."""

    what: str
    bytes: int


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one decoder block."""
    return sum(_count(shape) for shape in block_tensor_shapes(config).values())


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    return sum(_count(shape) for shape in tensor_shapes(config).values())


def memory(config: ModelConfig, recipe: Recipe, tokens: int) -> tuple[MemoryItem, ...]:
    """Peak memory above that of the imports, part by part, for `tokens` calibration tokens.

    The streamed passes hold one block; `distill` is the one stage that holds the whole model, with Adam's two moments
    and the gradient beside each fp32 weight, and it comes after the activations are gone, so the larger peak counts.
    """
    needs_hessian = any(not _data_free(step) for step in recipe.passes)
    widest = max(columns for _, columns in block_linear_shapes(config).values())
    flight = min(tokens, MICRO_TOKENS)
    streamed = (
        MemoryItem("block weights", int(BLOCK_COPIES * block_parameters(config) * FP32)),
        MemoryItem("embedding", config.vocab_size * config.hidden_size * FP32),
        MemoryItem("activations", STREAMS * tokens * config.hidden_size * FP32 if needs_hessian else 0),
        MemoryItem("Hessians", SQUARES * widest * widest * FP32 if needs_hessian else 0),
        MemoryItem("working set", INTERMEDIATES * flight * config.intermediate_size * FP32 if needs_hessian else 0),
    )
    if not any(isinstance(step, Distill) for step in recipe.passes):
        return streamed
    whole = (
        MemoryItem("whole model, gradients and moments (distill)", 5 * parameters(config) * FP32),
        MemoryItem("logits and activations (distill)", 4 * flight * config.vocab_size * FP32),
    )
    return max(streamed, whole, key=total)


def total(items: tuple[MemoryItem, ...]) -> int:
    """Bytes of all parts together."""
    return sum(item.bytes for item in items)


def flops(config: ModelConfig, recipe: Recipe, tokens: int, seq_len: int) -> float:
    """Floating-point operations of a run.

    A forward pass is 2 FLOP a weight and token, attention 4 a head dimension and pair of tokens; a gradient step is
    three forwards. A Hessian is 2 K^2 a token for each distinct input, its factors 4 K^3 / 3, GPTQ N K^2 for each
    linear and as much again for each descent round.
    """
    if all(_data_free(step) for step in recipe.passes):
        return 20.0 * parameters(config)
    forward = tokens * (2.0 * block_parameters(config) + 4.0 * seq_len * config.num_heads * config.head_dim / 2)
    shapes = block_linear_shapes(config)
    inputs = [shapes[name][1] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]
    a_block = 3 * forward + sum(2.0 * tokens * k * k + 4.0 * k**3 / 3 for k in inputs)
    for step in recipe.passes:
        if isinstance(step, Gptq):
            a_block += (1 + step.descent_rounds) * sum(1.0 * n * k * k for n, k in shapes.values())
        elif step.kind in ("awq", "smoothquant"):
            a_block += sum(2.0 * step.grid_points * n * k * k for n, k in shapes.values())
        elif isinstance(step, Rounding):
            a_block += 3 * forward * step.steps * step.batch_size * seq_len / tokens
    total_flops = config.num_layers * a_block
    for step in recipe.passes:
        if isinstance(step, Distill):
            total_flops += 8.0 * parameters(config) * step.steps * step.batch_size * seq_len
    return total_flops


def seconds(work: float, cores: int, gpu: bool) -> float:
    """Wall time of `work` FLOP at the assumed rates, plus two seconds of start."""
    return 2.0 + work / (GPU_RATE if gpu else CPU_CORE_RATE * cores)


def _data_free(step: object) -> bool:
    """Whether a pass needs no calibration text."""
    return getattr(step, "kind", "") == "rtn" and getattr(step, "grid", "") != "hessian"
