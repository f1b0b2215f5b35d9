"""A whole evaluation on the shipped model: its figures against plain loops, and a second candidate from the cache."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.checkpoint.load import load_model
from quantlab.errors import CheckpointError, GateError, UsageError
from quantlab.eval import run as subject
from quantlab.eval.corpus import find_texts
from quantlab.eval.facts import REPORT_FILE
from quantlab.eval.gate_file import default_gate, parse_gate
from quantlab.eval.harness_stage import load_stage
from quantlab.eval.options import EvalOptions, TaskOptions, TextOptions
from quantlab.eval.result import Report
from quantlab.eval.run import evaluate
from quantlab.events import Event, Notice, StepDone
from quantlab.models.decoder import CausalLM

WINDOW, TOKENS = 128, 1100


@pytest.fixture
def options(books_5m: Path, int4_model: Path, tmp_path: Path) -> EvalOptions:
    text = TextOptions(find_texts([]), window=WINDOW, tokens=TOKENS)
    return EvalOptions(int4_model, books_5m, text, default_gate(), "cpu", "float32", cache=tmp_path / "cache")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the models that were loaded whole."""
    folders: list[Path] = []

    def load(folder: Path, dtype: torch.dtype, device: torch.device) -> object:
        folders.append(folder)
        return load_model(folder, dtype, device)

    monkeypatch.setattr(subject, "load_model", load)
    return folders


def run(options: EvalOptions, tasks: TaskOptions | None = None) -> Report:
    return evaluate(options, load_stage(tasks) if tasks else None, lambda event: None)


def test_perplexity_is_that_of_a_plain_transformers_loop(options: EvalOptions, books_5m: Path) -> None:
    """The loop of IST-DASLab/gptq, word for word but for the device."""
    ids = AutoTokenizer.from_pretrained(books_5m)(options.text.sources[0].files[0].read_text(), return_tensors="pt")
    ids = ids.input_ids[:, :TOKENS]
    model = AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32).eval()
    nlls = []
    for i in range(ids.numel() // WINDOW):
        batch = ids[:, i * WINDOW : (i + 1) * WINDOW]
        with torch.no_grad():
            logits = model(batch).logits
        loss = torch.nn.CrossEntropyLoss()(logits[0, :-1], batch[0, 1:])
        nlls.append(loss.float() * WINDOW)
    wanted = torch.exp(torch.stack(nlls).sum() / (ids.numel() // WINDOW * WINDOW)).item()
    (text,) = run(options).texts
    assert text.baseline_perplexity.value == pytest.approx(wanted, rel=1e-4)
    assert text.protocol.name == f"gptq-{WINDOW}"
    assert text.protocol.tokens == ids.numel() // WINDOW * (WINDOW - 1)


def test_distribution_equals_brute_force_over_the_whole_vocabulary(
    options: EvalOptions, books_5m: Path, int4_model: Path
) -> None:
    models = [load_model(folder, torch.float32, "cpu") for folder in (books_5m, int4_model)]
    ids = AutoTokenizer.from_pretrained(books_5m).encode(options.text.sources[0].files[0].read_text())[:TOKENS]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    with torch.inference_mode():
        p, q = (model(rows)[:, :-1].double().log_softmax(-1).flatten(0, 1) for model in models)
    right = rows[:, 1:].flatten()[:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    before, after = p.gather(-1, right), q.gather(-1, right)
    (text,) = run(options).texts
    assert text.kl.mean.value == pytest.approx(kl.mean().item(), abs=1e-6)
    assert text.kl.maximum == pytest.approx(kl.max().item(), abs=2e-6)
    assert text.kl.p99 == pytest.approx(kl.quantile(0.99).item(), abs=2e-6)
    assert text.agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-6)
    assert text.log_ratio.value == pytest.approx((before - after).mean().item(), abs=1e-6)
    change = after.exp() - before.exp()
    assert text.delta_p_rms.value == pytest.approx(change.square().mean().sqrt().item(), abs=1e-6)
    by_window = (before - after).view(len(rows), -1).mean(-1)
    assert text.log_ratio.standard_error == pytest.approx(by_window.std().item() / math.sqrt(len(rows)), rel=1e-4)


def test_a_second_candidate_finds_the_baseline_in_the_cache_to_the_bit(
    options: EvalOptions, int4_model: Path, int8_model: Path, books_5m: Path, loaded: list[Path], task_dir: Path
) -> None:
    tasks = TaskOptions(("arc_easy", "lambada_openai"), task_dir)
    first = run(options, tasks)
    assert loaded == [books_5m, int4_model] and not first.baseline_from_cache
    second = run(replace(options, candidate=int8_model), tasks)
    assert loaded == [books_5m, int4_model, int8_model] and second.baseline_from_cache
    again = run(options, tasks)
    assert again.texts == first.texts and again.tasks == first.tasks and again.noise == first.noise
    assert second.noise == first.noise
    for one, other in zip(first.texts, second.texts, strict=True):
        assert one.baseline_perplexity == other.baseline_perplexity
        assert [slot.baseline_nll for slot in one.positions] == [slot.baseline_nll for slot in other.positions]
        assert one.kl.mean.value > 10 * other.kl.mean.value > 0
    assert [task.baseline for task in first.tasks] == [task.baseline for task in second.tasks]


def test_without_a_cache_the_figures_are_the_same(options: EvalOptions, tmp_path: Path) -> None:
    cached, live = run(options), run(replace(options, cache=None))
    assert live.texts == cached.texts and live.noise == cached.noise
    assert not live.baseline_from_cache
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_states_too_wide_for_the_cache_are_computed_each_time(
    options: EvalOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subject, "MAX_BYTES_A_TOKEN", 4 * 256 - 1)
    told: list[Event] = []
    report = evaluate(options, None, told.append)
    assert not report.baseline_from_cache and list(tmp_path.iterdir()) == []
    assert any(isinstance(event, Notice) and "runs again for every candidate" in event.text for event in told)


@pytest.mark.parametrize(("cached", "at_once"), [(True, [0, 0]), (False, [0, 1])])
def test_with_the_cache_one_model_is_in_memory_at_a_time_and_without_it_two(
    cached: bool, at_once: list[int], options: EvalOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`at_once` are the models in memory when the baseline is loaded, and when the candidate is."""
    models: weakref.WeakSet[CausalLM] = weakref.WeakSet()
    found: list[int] = []

    def load(folder: Path, dtype: torch.dtype, device: torch.device) -> CausalLM:
        gc.collect()
        found.append(len(models))
        model = load_model(folder, dtype, device)
        models.add(model)
        return model

    monkeypatch.setattr(subject, "load_model", load)
    run(options if cached else replace(options, cache=None))
    assert found == at_once


def test_a_damaged_cache_is_made_again_and_says_so(options: EvalOptions) -> None:
    first = run(options)
    assert options.cache is not None
    (states,) = options.cache.rglob("states.safetensors")
    states.write_bytes(states.read_bytes()[:-1])
    told: list[Event] = []
    second = evaluate(options, None, told.append)
    assert second.texts == first.texts and not second.baseline_from_cache
    assert any(isinstance(event, Notice) and "is damaged" in event.text for event in told)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: replace(text, window=64),
        lambda text: replace(text, tokens=900),
        lambda text: replace(text, protocols=("rolling",)),
    ],
    ids=["window", "tokens", "protocol"],
)
def test_another_protocol_never_takes_the_cached_baseline(
    change: Callable[[TextOptions], TextOptions], options: EvalOptions
) -> None:
    run(options)
    other = run(replace(options, text=change(options.text)))
    assert not other.baseline_from_cache


def test_a_model_against_itself_is_lossless_and_passes(options: EvalOptions, books_5m: Path) -> None:
    report = run(replace(options, candidate=books_5m))
    (text,) = report.texts
    assert (text.log_ratio.value, text.kl.maximum, text.agreement.value) == (0.0, 0.0, 1.0)
    assert report.gate is not None and report.gate.verdict == "pass"
    assert report.candidate.scheme == "16-bit" and report.candidate.bits_per_weight == 16.0


def test_both_protocols_stand_side_by_side_under_two_names(options: EvalOptions) -> None:
    text = replace(options.text, protocols=("gptq", "rolling"))
    report = run(replace(options, text=text))
    assert [(text.name, text.protocol.name) for text in report.texts] == [
        ("bundled", f"gptq-{WINDOW}"),
        ("bundled-rolling", f"rolling-{WINDOW}"),
    ]
    rolling = report.texts[1]
    assert rolling.protocol.tokens == TOKENS
    assert rolling.baseline_word_perplexity is not None and report.texts[0].baseline_word_perplexity is None
    bits = rolling.baseline_bits_per_byte * rolling.protocol.bytes * math.log(2)
    assert math.log(rolling.baseline_word_perplexity) == pytest.approx(bits / rolling.protocol.words)


def test_facts_name_what_was_judged(options: EvalOptions, int4_model: Path, int8_model: Path) -> None:
    int4, int8 = run(options), run(replace(options, candidate=int8_model))
    assert (int4.candidate.scheme, int8.candidate.scheme) == ("w4a16 g128", "w8a8")
    assert 4.1 < int4.candidate.bits_per_weight < 4.2 and 8.0 < int8.candidate.bits_per_weight < 8.2
    assert int4.candidate.bytes == (int4_model / "model.safetensors").stat().st_size
    assert int4.baseline == int8.baseline and int4.candidate.weights != int8.candidate.weights
    assert int4.candidate.tokenizer == int4.baseline.tokenizer
    assert [layer.module for layer in int4.layers][0] == "model.layers.0.self_attn.q_proj"
    assert len(int4.layers) == 28 and all(layer.error > 0 for layer in int4.layers)
    assert int4.seconds["total"] >= int4.seconds["candidate on text"] > 0


def test_a_damaged_quantizer_report_is_refused(options: EvalOptions, int4_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "candidate"
    folder.mkdir()
    for path in int4_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / REPORT_FILE).write_text('{"modules": [{"name": "a"}]}')
    with pytest.raises(CheckpointError, match="is not a report of quantlab quantize"):
        run(replace(options, candidate=folder))


def test_a_gate_on_what_is_not_measured_stops_before_any_work(options: EvalOptions, loaded: list[Path]) -> None:
    gate = parse_gate("require:\n  - metric: text.wiki.kl.mean\n    max: 1\n", "gate.yaml", "gate.yaml")
    with pytest.raises(GateError, match="'text.wiki.kl.mean' is not measured"):
        run(replace(options, gate=gate))
    assert loaded == [] and options.cache is not None and not options.cache.exists()


def test_a_window_beyond_the_models_is_refused(options: EvalOptions) -> None:
    with pytest.raises(UsageError, match="4096 tokens are more than the models' 2048"):
        run(replace(options, text=replace(options.text, window=4096)))


def test_progress_of_both_models_is_told(options: EvalOptions) -> None:
    told: list[Event] = []
    evaluate(options, None, told.append)
    steps = [event for event in told if isinstance(event, StepDone)]
    assert list(dict.fromkeys(step.stage for step in steps)) == ["baseline bundled", "candidate bundled"]
    assert all(step.steps == TOKENS // WINDOW for step in steps)
    assert sum(step.step == step.steps for step in steps) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int4_model", "int8_model"])
def test_a_gpu_gives_the_figures_of_a_cpu(scheme: str, options: EvalOptions, request: pytest.FixtureRequest) -> None:
    here = replace(options, candidate=request.getfixturevalue(scheme))
    cpu, gpu, again = (run(replace(here, device=device)) for device in ("cpu", "cuda", "cuda"))
    assert (gpu.baseline_from_cache, again.baseline_from_cache) == (False, True)
    assert gpu.texts == again.texts
    for one, other in zip(cpu.texts, gpu.texts, strict=True):
        assert one.protocol == other.protocol
        assert other.baseline_perplexity.value == pytest.approx(one.baseline_perplexity.value, rel=1e-4)
        # Where inputs are rounded to INT8, the last bit of a product decides: two devices differ as two samples do.
        assert other.log_ratio.value == pytest.approx(one.log_ratio.value, abs=3 * one.log_ratio.standard_error)
        assert other.kl.mean.value == pytest.approx(one.kl.mean.value, rel=0.05)
        assert other.agreement.value == pytest.approx(one.agreement.value, abs=0.01)
