"""The serving forward gives the logits of models.CausalLM, however tokens are cut into steps."""

from pathlib import Path

import pytest
import torch

from quantlab.checkpoint.load import load_model
from quantlab.runtime.build import build_engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.runner import ModelRunner
from tests.models.test_parity import LLAMA3, WINDOW, YARN
from tests.runtime.steps import batch, sequence, tiny_model

CASES = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2-late-windows": ("qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3-nope-windows": ("smollm3", WINDOW | {"no_rope_layer_interval": 2, "attention_bias": True}),
}
OPTIONS = EngineOptions(device="cpu", dtype="float32", kv_memory=1_000_000, max_model_len=48, max_num_seqs=4)


def runner_of(folder: Path, options: EngineOptions = OPTIONS) -> ModelRunner:
    runner = build_engine(folder, options)._runner
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_chunks_mixed_with_decode_give_the_logits_of_the_whole_sequence(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / name, *CASES[name])
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = load_model(folder, torch.float32, "cpu")(ids)
    runner = runner_of(folder)
    a = sequence("a", ids[0].tolist(), [5, 2, 9], slot=3)
    b = sequence("b", ids[1].tolist(), [1, 7, 4], slot=0)
    # (slices of the step, which rows' logits, whose positions they are)
    got = torch.cat(
        [
            runner.logits(batch((a, 0, 33), admitted=(a,)), range(33)),
            runner.logits(batch((a, 33, 1), (b, 0, 17), admitted=(b,)), range(18)),
            runner.logits(batch((b, 17, 20), (a, 34, 5)), range(25)),
            runner.logits(batch((a, 39, 1), (b, 37, 1)), range(2)),
            runner.logits(batch((b, 38, 2)), [1]),
        ]
    )
    wanted = torch.cat([expected[0, :34], expected[1, :37], expected[0, 34:40], expected[1, 37:38], expected[1, 39:]])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_only_the_wanted_rows_are_computed_behind_the_last_attention(tmp_path: Path) -> None:
    runner = runner_of(tiny_model(tmp_path / "m", "llama", {}))
    one = sequence("a", list(range(3, 23)), [1, 2], slot=0)
    every = runner.logits(batch((one, 0, 20), admitted=(one,)), range(20))
    some = runner.logits(batch((one, 0, 20)), [4, 19])
    torch.testing.assert_close(some, every[[4, 19]], rtol=1e-5, atol=1e-5)
    assert runner.logits(batch((one, 0, 20)), []).shape == (0, 96)


@torch.inference_mode()
def test_a_token_that_the_host_does_not_know_is_the_one_last_sampled(tmp_path: Path) -> None:
    runner = runner_of(tiny_model(tmp_path / "m", "llama", {}))
    known = sequence("a", [5, 6, 7, 8], [1], slot=2)
    wanted = runner.logits(batch((known, 0, 4), admitted=(known,)), [3])
    pending = sequence("b", [5, 6, 7], [3], slot=1)
    runner.logits(batch((pending, 0, 3), admitted=(pending,)), [2])
    runner.sampler.last_tokens[1] = 8
    torch.testing.assert_close(runner.logits(batch((pending, 3, 1)), [0]), wanted, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_shared_blocks_serve_whoever_begins_alike(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {})
    runner = runner_of(folder)
    ids = torch.randint(3, 96, (1, 30), generator=torch.Generator().manual_seed(2))
    first = sequence("a", ids[0].tolist(), [1, 2], slot=0)
    runner.logits(batch((first, 0, 30), admitted=(first,)), [])
    second = sequence("b", ids[0].tolist(), [1, 3], slot=1)  # block 1 holds the first 16 tokens already
    got = runner.logits(batch((second, 16, 14), admitted=(second,)), range(14))
    expected = load_model(folder, torch.float32, "cpu")(ids)[0, 16:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_int8_cache_moves_logits_a_little(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "qwen3", {"head_dim": 16})
    ids = list(range(3, 43))
    exact, coded = (
        runner_of(folder, EngineOptions(device="cpu", dtype="float32", kv_memory=1_000_000, kv_dtype=kind))
        for kind in ("auto", "int8")
    )
    logits = []
    for runner in (exact, coded):
        one = sequence("a", ids, [1, 2, 3], slot=0)
        runner.logits(batch((one, 0, 39), admitted=(one,)), [])
        logits.append(runner.logits(batch((one, 39, 1)), [0]))
    error = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    assert 0 < error < 0.02
