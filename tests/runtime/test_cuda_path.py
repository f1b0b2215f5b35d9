"""The GPU path, in Triton's interpreter, gives the logits of the model definition; on a GPU, graphs do too."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.checkpoint.load import load_model
from quantlab.checkpoint.model_folder import open_model
from quantlab.cli.app import main
from quantlab.errors import UnsupportedModel
from quantlab.runtime.backend_cuda import CudaBackend, check_heads
from quantlab.runtime.batch import Batch, Slice
from quantlab.runtime.build import Identity, build_engine, engine_of
from quantlab.runtime.engine import Engine
from quantlab.runtime.graphs import CHUNKS, LADDER, cut_lengths, ladder, mixed_frames
from quantlab.runtime.operations_cuda import CudaOperations
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.source import FolderSource
from quantlab.runtime.step import Frame, unpack
from quantlab.runtime.step_builder import StepBuilder
from quantlab.runtime.weights import Weights, build_weights
from tests.runtime.steps import batch, sequence, tiny_model

FLAGS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
CASES = {
    "llama": ("llama", FLAGS | {"num_key_value_heads": 1}),
    "qwen3-norms": ("qwen3", FLAGS | {"num_key_value_heads": 2}),
    "mistral-window": ("mistral", FLAGS | {"num_key_value_heads": 1, "sliding_window": 5}),
}
HALF = torch.float16


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cuda_runner(weights: Weights, int8_kv: bool = False) -> ModelRunner:
    """A runner of the GPU's operations, wherever they run here."""
    builder = StepBuilder(4, 4, 16, device())
    operations = CudaOperations(weights.config, HALF, builder.tables, (12, 16), int8_kv)
    return ModelRunner(weights, operations, builder, Sampler(weights.config.vocab_size, 4, device()))


def logits_in_steps(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Logits of the last positions of two sequences of the same text: in a chunk, then mixed, then one by one."""
    a, b = sequence("a", ids, [5, 2, 9], slot=3), sequence("b", ids, [1, 7, 4], slot=0)
    first = runner.logits(batch((a, 0, 17), admitted=(a,)), [16]).clone()
    second = runner.logits(batch((b, 0, 18), (a, 17, 1), admitted=(b,)), [17, 18]).clone()
    third = runner.logits(batch((a, 18, 1), (b, 18, 1)), [0, 1]).clone()
    return torch.cat([first, second, third])


@pytest.mark.parametrize(("name", "int8_kv"), [("llama", False), ("mistral-window", False), ("qwen3-norms", True)])
@torch.inference_mode()
def test_chunks_and_single_tokens_give_the_logits_of_the_model(name: str, int8_kv: bool, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / name, *CASES[name])
    backend = CudaBackend(device(), HALF, EngineOptions())
    weights = build_weights(FolderSource(open_model(folder), HALF, device()), backend, 48)
    ids = torch.randint(3, 96, (19,), generator=torch.Generator().manual_seed(5)).tolist()
    got = logits_in_steps(cuda_runner(weights, int8_kv), ids)
    exact = load_model(folder, torch.float32, "cpu")(torch.tensor([ids]))[0]
    assert relative_rmse(got.cpu(), exact[[16, 17, 17, 18, 18]]) < (0.02 if int8_kv else 0.003)


@torch.inference_mode()
def test_padding_to_a_frame_changes_no_logits(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", *CASES["llama"])
    weights = build_weights(
        FolderSource(open_model(folder), HALF, device()), CudaBackend(device(), HALF, EngineOptions()), 48
    )
    runner = cuda_runner(weights)
    ids = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(5)).tolist()
    a, b = sequence("a", ids, [5, 2, 9], slot=3), sequence("b", ids, [1, 7, 4], slot=0)
    runner.logits(batch((a, 0, 17), admitted=(a,)), [])
    mixed = Batch(1, (Slice(b, 0, 19, True), Slice(a, 17, 1, True)), (b,))
    plain = runner.logits(mixed, [18, 19])
    frame = Frame(3, 4, 24)
    vector = runner.builder.idle(frame)
    rows = runner.builder.fill(mixed, frame, vector)
    framed = runner.forward(unpack(vector, frame.shape(40)))[rows]
    torch.testing.assert_close(framed, plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("recipe", "kernel"), [("w4a16-rtn", "int4 x fp16"), ("w8a8-rtn", "int8 x int8")])
@torch.inference_mode()
def test_packed_folders_run_in_our_kernels_and_mean_the_same(recipe: str, kernel: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", *CASES["llama"])
    packed = tmp_path / "packed"
    assert main(["quantize", str(folder), "--out", str(packed), "--recipe", recipe, "--device", "cpu"]) == 0
    backend = CudaBackend(device(), HALF, EngineOptions())
    weights = build_weights(FolderSource(open_model(packed), HALF, device()), backend, 48)
    assert any(kernel in line for line in weights.kernels())
    ids = list(range(40, 59))
    got = logits_in_steps(cuda_runner(weights), ids)
    exact = load_model(packed, torch.float32, "cpu")(torch.tensor([ids]))[0]
    # Codes of activations that fall the other way move INT8's logits more than fp16 does.
    assert relative_rmse(got.cpu(), exact[[16, 17, 17, 18, 18]]) < (0.003 if recipe == "w4a16-rtn" else 0.02)


def test_an_engine_of_the_gpu_path_writes_what_one_of_the_cpu_writes(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", *CASES["llama"])
    sizes = {"kv_memory": 200_000, "max_model_len": 48, "max_num_seqs": 3, "max_batch_tokens": 32}
    plain = build_engine(folder, EngineOptions(device="cpu", dtype="float32", **sizes))
    options = EngineOptions(device="cpu", cuda_graphs=False, **sizes)
    backend = CudaBackend(device(), HALF, options)
    weights = build_weights(FolderSource(open_model(folder), HALF, device()), backend, 48)
    engine = engine_of(weights, backend, options, Identity("m", "16-bit", ()), None, time.perf_counter())
    texts = [greedy(one, ([3, 70, 12], list(range(20, 44))), tokens=4) for one in (plain, engine)]
    assert texts[0] == texts[1]
    assert engine.info.kernels[-1].startswith("attention: quantlab")


def test_an_int8_head_says_what_it_costs(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", *CASES["llama"])
    weights = []
    for asked in (False, True):
        backend = CudaBackend(device(), HALF, EngineOptions(int8_head=asked))
        weights.append(build_weights(FolderSource(open_model(folder), HALF, device()), backend, 48))
    x = torch.randn(3, 128, device=device()).to(HALF)
    plain, coded = (some.head(x) for some in weights)
    assert 0.001 < relative_rmse(coded, plain) < 0.02
    assert "% off" in weights[1].head.kernel
    assert weights[1].head.nbytes < weights[0].head.nbytes


def test_heads_without_kernels_are_refused(books_5m: Path) -> None:
    config = open_model(books_5m).config
    check_heads(config)
    with pytest.raises(UnsupportedModel, match="head_dim 80 has no GPU kernel"):
        check_heads(replace(config, head_dim=80))


def test_graphs_are_captured_for_few_sizes_and_for_each_way_of_cutting() -> None:
    assert ladder(256) == [size for size in LADDER if size <= 256]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(2000)[-1] == LADDER[-1]
    frames = mixed_frames(sequences=20, step_tokens=100)
    assert {(frame.singles, frame.chunk_tokens) for frame in frames} == {
        (singles, tokens) for singles in (0, 16, 20) for tokens in (16, 64, 100)
    }
    assert frames[0].tokens == 120 and all(frame.chunks == CHUNKS for frame in frames)
    assert cut_lengths(lambda length: min(length, 2000), 5000) == [512, 1024, 5000]
    assert cut_lengths(lambda length: "same", 100_000) == [100_000]
    assert cut_lengths(lambda length: length, 300) == [300]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_greedy_text_on_a_gpu_is_that_of_the_cpu(books_5m: Path, graphs: bool) -> None:
    # In fp16 22 of 24 texts of 40 tokens were those of fp32 when this was measured: a near tie may turn a text off.
    sizes = {"kv_memory": 20_000_000, "max_model_len": 256, "max_num_seqs": 8}
    prompts = ([1, 300, 17, 4000], [1, *range(100, 160)], [1, 7])
    cpu = greedy(build_engine(books_5m, EngineOptions(device="cpu", dtype="float32", **sizes)), prompts, tokens=12)
    options = EngineOptions(device="cuda", dtype="float16", cuda_graphs=graphs, **sizes)
    gpu = greedy(build_engine(books_5m, options), prompts, tokens=12)
    assert sum(a == b for i in cpu for a, b in zip(cpu[i], gpu[i], strict=True)) >= 30  # of 36


def greedy(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, list[int]]:
    """What the engine writes for each prompt."""
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), SamplingParams(max_tokens=tokens, temperature=0.0)))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).extend(event.token_ids)
    return found
