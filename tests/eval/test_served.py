"""The candidate measured as it is served: the same figures, and the price of an INT8 cache."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.errors import UsageError
from quantlab.eval.corpus import find_texts
from quantlab.eval.gate_file import default_gate
from quantlab.eval.harness_stage import load_stage
from quantlab.eval.options import EvalOptions, ServedOptions, TaskOptions, TextOptions
from quantlab.eval.reports.tables import provenance
from quantlab.eval.result import Report
from quantlab.eval.run import evaluate
from quantlab.events import Event, Notice


@pytest.fixture
def options(books_5m: Path, int4_model: Path, tmp_path: Path) -> EvalOptions:
    text = TextOptions(find_texts([]), protocols=("gptq", "rolling"), window=64, tokens=600)
    return EvalOptions(int4_model, books_5m, text, default_gate(), "cpu", "float32", batch=2, cache=tmp_path / "cache")


def run(options: EvalOptions) -> Report:
    return evaluate(options, None, lambda event: None)


def test_a_served_candidate_scores_as_its_file_says(options: EvalOptions) -> None:
    plain, served = run(options), run(replace(options, served=ServedOptions()))
    assert served.baseline_from_cache and plain.served is None
    for before, after in zip(plain.texts, served.texts, strict=True):
        assert after.perplexity.value == pytest.approx(before.perplexity.value, rel=1e-3)
        assert after.kl.mean.value == pytest.approx(before.kl.mean.value, rel=0.05)


def test_an_int8_cache_is_named_in_the_report_and_shows_in_the_figures(options: EvalOptions) -> None:
    same = replace(options, candidate=options.baseline)
    exact, rounded = run(replace(same, served=ServedOptions())), run(replace(same, served=ServedOptions("int8")))
    assert rounded.served is not None and rounded.served.kv_dtype == "int8" and rounded.served.kernels
    assert ("candidate ran", "as served, keys and values in int8") in provenance(rounded).rows
    assert exact.texts[0].kl.mean.value < 1e-6 < rounded.texts[0].kl.mean.value < 1e-2


def test_tasks_are_asked_of_the_engine(options: EvalOptions, task_dir: Path) -> None:
    told: list[Event] = []

    def ask(served: ServedOptions | None) -> Report:
        stage = load_stage(TaskOptions(("piqa", "lambada_openai"), task_dir, limit=6))
        return evaluate(replace(options, served=served), stage, told.append)

    plain, served = ask(None), ask(ServedOptions())
    assert served.served is not None and served.served.kernels
    assert [task.candidate.value for task in served.tasks] == [task.candidate.value for task in plain.tasks]
    assert not lengths(told)


def test_an_engine_that_takes_less_than_the_model_says_so(
    options: EvalOptions, task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.runtime.sizes.LONGEST_BY_DEFAULT", 96)
    told: list[Event] = []
    stage = load_stage(TaskOptions(("piqa",), task_dir, limit=2))
    evaluate(replace(options, served=ServedOptions()), stage, told.append)
    (text,) = lengths(told)
    assert "takes 96 tokens and the model 2,048" in text


def lengths(told: list[Event]) -> list[str]:
    """What was said of the engine's length."""
    return [event.text for event in told if isinstance(event, Notice) and "the engine takes" in event.text]


def test_a_gpu_s_output_layer_is_refused(options: EvalOptions) -> None:
    with pytest.raises(UsageError, match="a CPU has no product for it"):
        run(replace(options, served=ServedOptions(int8_head=True)))
