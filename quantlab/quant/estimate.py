"""Peak memory and time of a run, from sizes alone: two documented formulas.

Knows nothing about tensors or files. Both are estimates; what they assume is written where they are computed.
"""

from dataclasses import dataclass

from quantlab.models.config import ModelConfig
from quantlab.models.naming import INPUT_GROUPS, block_linear_shapes, block_tensor_shapes, tensor_shapes
from quantlab.quant.amounts import CHUNK_ELEMENTS, HELD_OUT_TOKENS, MICRO_TOKENS, compared_samples, held_out_samples
from quantlab.recipe import Distill, Gptq, Recipe, Rounding

FP32, HALF, CODE = 4, 2, 1
# Sustained rates that the time estimate assumes, in FLOP/s: a core that multiplies bf16 (two of them took 32 s for
# balanced on a 28M model, 64 x 1,024 tokens), and a data-centre GPU.
CPU_CORE_RATE = 140e9
GPU_RATE = 150e12
# What torch and its libraries keep for themselves once work has begun: compiled kernels, packed operands.
LIBRARIES = 60_000_000
# Arrays of the widest intermediate of the tokens in flight that are alive together.
INTERMEDIATES = 4
# fp32 arrays of the size of the rows solved at a time that a solver keeps.
CHUNKS = 4


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


def memory(config: ModelConfig, recipe: Recipe, samples: int, seq_len: int) -> tuple[MemoryItem, ...]:
    """Peak memory above that of the imports, part by part, for the samples of `seq_len` tokens that the solver sees.

    Checked against the peak of real runs on a CPU (`bench.memory`), for a bf16 checkpoint. The streamed passes hold one
    block; `distill` is the one stage that holds the whole model, with Adam's two moments and the gradient beside each
    fp32 weight, and it comes after the activations are gone, so the larger peak counts.
    """
    streamed = _streamed(config, recipe, samples, seq_len)
    if not any(isinstance(step, Distill) for step in recipe.passes):
        return streamed
    flight = min(samples * seq_len, MICRO_TOKENS)
    whole = (
        MemoryItem("whole model, gradients and moments (distill)", 5 * parameters(config) * FP32),
        MemoryItem("logits and activations (distill)", 4 * flight * config.vocab_size * FP32),
    )
    return max(streamed, whole, key=total)


def _streamed(config: ModelConfig, recipe: Recipe, samples: int, seq_len: int) -> tuple[MemoryItem, ...]:
    """The parts of the peak of the passes that hold one block, reached while its widest group is solved."""
    copies = 2 if _compared(recipe, samples) else 1
    shapes = block_linear_shapes(config)
    if all(_data_free(step) for step in recipe.passes):
        group = max(n * k for n, k in shapes.values()) * FP32
        seen = tokens = 0
    else:
        group = max(_group_bytes(n, k, recipe, samples * seq_len) for n, k in _group_shapes(shapes))
        tokens = samples * seq_len
        seen = tokens + _compared(recipe, samples) * seq_len
    widest = max(k for _, k in shapes.values())
    chunk = min(CHUNK_ELEMENTS, max(n * k for n, k in _group_shapes(shapes)))
    return (
        MemoryItem("block weights and codes", block_parameters(config) * (copies * HALF + CODE)),
        MemoryItem("activations", seen * (config.hidden_size * FP32 + widest * HALF)),
        MemoryItem("a group's weights, Hessian and factor", group),
        MemoryItem("solver's working set", CHUNKS * chunk * FP32),
        MemoryItem("tokens in flight", INTERMEDIATES * min(tokens, MICRO_TOKENS) * widest * HALF),
        MemoryItem("libraries", LIBRARIES),
    )


def _group_shapes(shapes: dict[str, tuple[int, int]]) -> list[tuple[int, int]]:
    """Outputs and inputs of each group of linears that share an input, stacked."""
    return [(sum(shapes[name][0] for name in names), shapes[names[0]][1]) for names in INPUT_GROUPS]


def _group_bytes(outputs: int, inputs: int, recipe: Recipe, tokens: int) -> int:
    """Weights in fp32, the residual where there is a correction, Hessian and factor, held-out inputs and outputs."""
    matrices = 2 if _compared(recipe, 1) else 1
    held_out = min(HELD_OUT_TOKENS, max(1, tokens // 16))
    return FP32 * (matrices * outputs * inputs + 2 * inputs * inputs + held_out * (inputs + outputs))


def _compared(recipe: Recipe, samples: int) -> int:
    return compared_samples(recipe, samples, held_out_samples(samples))


def total(items: tuple[MemoryItem, ...]) -> int:
    """Bytes of all parts together."""
    return sum(item.bytes for item in items)


def flops(config: ModelConfig, recipe: Recipe, samples: int, seq_len: int, gpu: bool = True) -> float:
    """Floating-point operations of a run whose solver sees `samples`; a CPU takes fewer steps where the recipe says so.

    A forward pass is 2 FLOP a weight and token, attention 4 a head dimension and pair of tokens; a gradient step is
    three forwards. A Hessian is 2 K^2 a token for each distinct input, its factors 4 K^3 / 3, GPTQ N K^2 for each
    linear and as much again for each descent round.
    """
    if all(_data_free(step) for step in recipe.passes):
        return 20.0 * parameters(config)
    tokens = samples * seq_len
    forward = tokens * (2.0 * block_parameters(config) + 4.0 * seq_len * config.num_heads * config.head_dim / 2)
    shapes = block_linear_shapes(config)
    inputs = [shapes[name][1] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]
    a_block = (1 + _compared(recipe, samples) / samples) * forward + sum(
        2.0 * tokens * k * k + 4.0 * k**3 / 3 for k in inputs
    )
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
            count = step.steps * step.batch_size if gpu else step.cpu_steps * step.cpu_batch_size
            total_flops += 8.0 * parameters(config) * count * seq_len
    return total_flops


def seconds(work: float, cores: int, gpu: bool) -> float:
    """Wall time of `work` FLOP at the assumed rates, plus two seconds of start."""
    return 2.0 + work / (GPU_RATE if gpu else CPU_CORE_RATE * cores)


def _data_free(step: object) -> bool:
    """Whether a pass needs no calibration text."""
    return getattr(step, "kind", "") == "rtn" and getattr(step, "grid", "") != "hessian"
