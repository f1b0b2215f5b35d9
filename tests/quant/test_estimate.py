"""The two formulas of a plan: what they grow with, and what they leave out."""

from typing import Any

import pytest

from quantlab.models.config import ModelConfig
from quantlab.quant.amounts import solver_samples
from quantlab.quant.estimate import block_parameters, flops, memory, parameters, seconds, total
from quantlab.recipe_file import builtin

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig.from_json(LLAMA_1B, "test")
SAMPLES, SEQ_LEN = 64, 1024


def part(recipe: str, what: str, samples: int = SAMPLES) -> int:
    """Bytes of one part of the peak."""
    return next(item.bytes for item in memory(CONFIG, builtin(recipe), samples, SEQ_LEN) if item.what.startswith(what))


def test_parameters_are_those_of_llama_3_2_1b() -> None:
    assert parameters(CONFIG) == 1_235_814_400
    assert block_parameters(CONFIG) == 60_821_504


def test_rtn_needs_no_activations() -> None:
    assert part("w4a16-rtn", "activations") == part("w4a16-rtn", "tokens in flight") == 0
    assert part("w4a16-gptq", "activations") > 0


def test_activations_grow_with_tokens_and_block_weights_do_not() -> None:
    assert part("w4a16-gptq", "activations", 2 * SAMPLES) == 2 * part("w4a16-gptq", "activations")
    assert part("w4a16-gptq", "block weights", 2 * SAMPLES) == part("w4a16-gptq", "block weights")


def test_a_streamed_run_holds_blocks_and_not_the_model() -> None:
    streamed = total(memory(CONFIG, builtin("w4a16-balanced"), 1, SEQ_LEN))
    assert part("w4a16-balanced", "block weights") < 4 * parameters(CONFIG) / 4
    assert streamed < 4 * parameters(CONFIG)
    assert total(memory(CONFIG, builtin("w4a16-best"), 1, SEQ_LEN)) > 4 * 4 * parameters(CONFIG)


@pytest.mark.parametrize(
    ("less", "more"),
    [("w4a16-rtn", "w4a16-fast"), ("w4a16-fast", "w4a16-gptq"), ("w4a16-gptq", "w4a16-balanced"),
     ("w4a16-balanced", "w4a16-best"), ("w8a8-gptq", "w8a8-balanced")],
)  # fmt: skip
def test_better_recipes_take_longer(less: str, more: str) -> None:
    assert flops(CONFIG, builtin(less), SAMPLES, SEQ_LEN) < flops(CONFIG, builtin(more), SAMPLES, SEQ_LEN)


def test_more_cores_or_a_gpu_take_less_time() -> None:
    work = flops(CONFIG, builtin("w4a16-balanced"), SAMPLES, SEQ_LEN)
    assert seconds(work, 2, gpu=False) > seconds(work, 16, gpu=False) > seconds(work, 2, gpu=True)


def test_a_correction_holds_a_second_block_and_a_second_stream() -> None:
    plain, corrected = "w4a16-gptq", "w4a16-balanced"
    assert part(corrected, "block weights") > 1.5 * part(plain, "block weights")
    assert 1.4 < part(corrected, "activations") / part(plain, "activations") < 1.7


def test_a_cpu_is_given_what_it_can_do() -> None:
    best = builtin("w4a16-best")
    limit = next(p.cpu_samples for p in best.passes if p.kind == "gptq")
    assert solver_samples(best, 1000, gpu=True) == 1000 and solver_samples(best, 1000, gpu=False) == limit
    assert flops(CONFIG, best, 64, SEQ_LEN, gpu=False) < flops(CONFIG, best, 64, SEQ_LEN, gpu=True) / 10
