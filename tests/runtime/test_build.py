"""From folders to engines: what was built, and that its text is transformers' own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from quantlab.bench.gpu_timing import relative_rmse
from quantlab.checkpoint.load import load_model
from quantlab.errors import UsageError
from quantlab.models.config import ModelConfig
from quantlab.runtime.backend import choose_dtype, kernels_here
from quantlab.runtime.build import build_engine, end_tokens
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams
from quantlab.runtime.runner import ModelRunner
from tests.runtime.steps import batch, sequence, tiny_model

OPTIONS = EngineOptions(device="cpu", dtype="float32", kv_memory=20_000_000, max_model_len=256, max_num_seqs=8)
PROMPTS = ([1, 300, 17, 4000], [1, *range(100, 160)], [1, 7], [1, *range(900, 1000, 3)])


def generate(folder: Path, options: EngineOptions, tokens: int) -> dict[str, list[int]]:
    engine = build_engine(folder, options)
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(str(i), tuple(prompt), SamplingParams(max_tokens=tokens, temperature=0.0)))
    texts: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            texts.setdefault(event.request_id, []).extend(event.token_ids)
    return texts


@pytest.mark.parametrize("budget", [512, 16])
def test_greedy_text_is_that_of_transformers_one_prompt_at_a_time(books_5m: Path, budget: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32)
    options = EngineOptions(
        device="cpu", dtype="float32", kv_memory=20_000_000, max_model_len=256, max_batch_tokens=budget
    )
    texts = generate(books_5m, options, tokens=24)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert texts[str(i)] == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "kernel"), [("int4_model", "packed int4"), ("int8_model", "int8 x int8")])
@torch.inference_mode()
def test_packed_folders_run_in_packed_kernels_and_mean_the_same(
    kind: str, kernel: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    engine = build_engine(folder, EngineOptions(device="cpu", dtype="bfloat16", kv_memory=20_000_000, max_model_len=64))
    assert any(kernel in line for line in engine.info.kernels)
    assert not any("no kernel" in line for line in engine.info.kernels)
    runner = engine._runner
    assert isinstance(runner, ModelRunner)
    ids = list(range(100, 148))
    one = sequence("a", ids, [1, 2, 3], slot=0)
    logits = runner.logits(batch((one, 0, 48), admitted=(one,)), range(48))
    exact = load_model(folder, torch.float32, "cpu")(torch.tensor([ids]))[0]
    plain = load_model(folder, torch.bfloat16, "cpu")(torch.tensor([ids]))[0]
    assert relative_rmse(logits, exact) < 1.3 * relative_rmse(plain, exact)


def test_what_was_built_is_said(int4_model: Path) -> None:
    info = build_engine(int4_model, OPTIONS).info
    assert (info.model, info.scheme.split(" (")[0], info.device) == (int4_model.name, "w4a16 g128", "cpu")
    assert info.kernels[0].startswith("qkv, o, gate_up, down: torch packed int4 x bf16 (w4a16 g128) (16 layers)")
    assert info.kernels[1] == "lm_head: torch float32 (1 layer)"
    assert info.eos_token_ids == (2,)
    assert info.kv_bytes <= 20_000_000 < info.kv_bytes + info.kv_bytes // info.num_blocks
    assert info.startup_seconds > 0


def test_a_cpu_runs_half_precision_in_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("quantlab.runtime.backend.multiplies_bf16", lambda device: True)
    assert choose_dtype("auto", cpu, "float16") == torch.bfloat16
    assert choose_dtype("auto", cpu, "float32") == torch.float32
    monkeypatch.setattr("quantlab.runtime.backend.multiplies_bf16", lambda device: False)
    assert choose_dtype("auto", cpu, "bfloat16") == torch.float32
    assert choose_dtype("float16", cpu, "bfloat16") == torch.float16
    with pytest.raises(UsageError, match="16-bit activations"):
        choose_dtype("float32", torch.device("cuda"), "bfloat16")
    with pytest.raises(UsageError, match="not one of"):
        choose_dtype("int3", cpu, "bfloat16")


def test_what_only_a_gpu_has_is_refused_on_a_cpu(books_5m: Path) -> None:
    with pytest.raises(UsageError, match="no product for it"):
        build_engine(books_5m, EngineOptions(device="cpu", int8_head=True))


def test_a_machine_says_what_serves_which_scheme() -> None:
    found = kernels_here()
    assert list(found) == ["16-bit", "w4a16 g128", "w8a8", "w8a16 channel"]
    assert "int4" in found["w4a16 g128"] and "int8 x int8" in found["w8a8"]
    assert not any("no kernel" in kernel for kernel in found.values())


def test_end_tokens_are_those_for_generation_where_the_folder_names_them(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {})
    config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()), "config.json")
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 7, 100000, true]}')
    assert end_tokens(folder, config) == (5, 7)
    path.write_text('{"eos_token_id": null}')
    assert end_tokens(folder, config) == config.eos_token_ids == (2,)


def test_a_cpu_serves_without_triton_and_without_transformers(books_5m: Path) -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from pathlib import Path\n"
        "from quantlab.runtime.build import build_engine\n"
        "from quantlab.runtime.options import EngineOptions\n"
        f"build_engine(Path({str(books_5m)!r}), EngineOptions(device='cpu', kv_memory=20_000_000))\n"
        "assert 'transformers' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
