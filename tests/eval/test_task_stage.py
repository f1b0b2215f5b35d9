"""The tasks of one evaluation: the baseline answers once, and is loaded only if the cache cannot speak for it."""

from pathlib import Path

import pytest

from quantlab.eval import task_stage
from quantlab.eval.answers import PlainAnswers
from quantlab.eval.options import TaskOptions
from quantlab.eval.task_set import TaskSet, load_tasks
from quantlab.eval.task_stage import Runner, baseline_tasks, candidate_tasks
from quantlab.models.decoder import CausalLM

IDENTITY = ("a" * 64, "b" * 64)


@pytest.fixture
def tasks(task_dir: Path) -> TaskSet:
    return load_tasks(TaskOptions(("quick",), task_dir, limit=6))


@pytest.fixture
def runner(books_tokenizer) -> Runner:
    return Runner(books_tokenizer, 1, "float32", "cpu")


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


def never() -> CausalLM:
    raise AssertionError("the baseline was loaded")


def test_a_model_against_itself_flips_nothing(tasks, runner, books_model):
    baseline = baseline_tasks(tasks, lambda: books_model, IDENTITY, runner, None, quiet)
    assert not baseline.cached
    results = candidate_tasks(tasks, PlainAnswers(books_model, runner.rows), baseline, 0.05, runner, quiet)
    assert [result.name for result in results] == ["lambada_openai", "piqa", "winogrande"]
    for result in results:
        assert (result.right_to_wrong, result.wrong_to_right, result.answers_changed, result.items) == (0, 0, 0, 6)
        assert (result.mcnemar_p, result.difference.value) == (1.0, 0.0)
    assert [(noise.name, noise.items, noise.flips) for noise in baseline.noise] == [
        ("lambada_openai", 6, 0), ("piqa", 6, 0), ("winogrande", 6, 0),
    ]  # fmt: skip


def test_a_cached_baseline_is_not_loaded_and_is_equal_to_the_bit(tasks, runner, books_model, tmp_path):
    first = baseline_tasks(tasks, lambda: books_model, IDENTITY, runner, tmp_path, quiet)
    again = baseline_tasks(tasks, never, IDENTITY, runner, tmp_path, quiet)
    assert again.cached
    assert (again.outcomes, again.noise) == (first.outcomes, first.noise)


def test_only_what_is_missing_is_answered(tasks, runner, books_model, tmp_path, monkeypatch):
    baseline_tasks(tasks.only(["piqa"]), lambda: books_model, IDENTITY, runner, tmp_path, quiet)
    asked = []
    inner = task_stage.run_tasks
    monkeypatch.setattr(
        task_stage, "run_tasks", lambda m, t, some, *rest: asked.append(some) or inner(m, t, some, *rest)
    )
    found = baseline_tasks(tasks, lambda: books_model, IDENTITY, runner, tmp_path, quiet)
    assert {name for some in asked for name in some.metrics} == {"lambada_openai", "winogrande"}
    assert list(found.outcomes) == ["lambada_openai", "piqa", "winogrande"]
    assert not found.cached


@pytest.mark.parametrize("change", ["weights", "tokenizer", "windows", "dtype", "machine", "items"])
def test_whatever_decides_the_answers_is_part_of_the_key(change, tasks, runner, books_model, books_tokenizer, tmp_path):
    few = tasks.only(["winogrande"])
    baseline_tasks(few, lambda: books_model, IDENTITY, runner, tmp_path, quiet)
    identity = {"weights": ("c" * 64, IDENTITY[1]), "tokenizer": (IDENTITY[0], "c" * 64)}.get(change, IDENTITY)
    other = {
        "windows": Runner(books_tokenizer, 2, "float32", "cpu"),
        "dtype": Runner(books_tokenizer, 1, "bfloat16", "cpu"),
        "machine": Runner(books_tokenizer, 1, "float32", "gpu"),
    }.get(change, runner)
    asked = few.first(3) if change == "items" else few
    with pytest.raises(AssertionError, match="the baseline was loaded"):
        baseline_tasks(asked, never, identity, other, tmp_path, quiet)


def test_noise_is_measured_on_the_first_items_with_twice_the_rows(tasks, runner, books_model, monkeypatch):
    asked = []
    inner = task_stage.run_tasks

    def watch(answers, tokenizer, some, tick):
        asked.append((some.requests, answers.rows))
        return inner(answers, tokenizer, some, tick)

    monkeypatch.setattr(task_stage, "run_tasks", watch)
    monkeypatch.setattr(task_stage, "NOISE_ITEMS", 2)
    told: list[tuple[int, int]] = []
    found = baseline_tasks(
        tasks, lambda: books_model, IDENTITY, runner, None, lambda done, total: told.append((done, total))
    )
    assert asked == [(6 + 12 + 12, runner.rows), (2 + 4 + 4, 2 * runner.rows)]
    assert {noise.items for noise in found.noise} == {2}
    assert told == sorted(told)
    assert told[-1] == (40, 40)
