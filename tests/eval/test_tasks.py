"""A model on tasks: what it is said to have chosen and got right, by hand and against the harness's own loop."""

import json
import math
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import evaluate

from quantlab.checkpoint.load import load_model
from quantlab.errors import NumericsError, UsageError
from quantlab.eval.answers import PlainAnswers
from quantlab.eval.harness import HarnessModel
from quantlab.eval.options import TaskOptions
from quantlab.eval.outcomes import TaskOutcome
from quantlab.eval.task_set import TaskSet, load_tasks, quiet_libraries
from quantlab.eval.tasks import PROMPT_CHARS, run_tasks

BASE = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
"""
MANY = BASE + "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
WRITTEN = BASE + "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
ACC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
MATCH = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"


def quiz(folder: Path, text: str, items: list[dict], allow_code: bool = False) -> TaskSet:
    (folder / "quiz.yaml").write_text(text)
    (folder / "quiz.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    return load_tasks(TaskOptions(("quiz",), folder, allow_code=allow_code))


def run(tasks: TaskSet, model, tokenizer, batch_size: int = 4) -> dict[str, TaskOutcome]:
    return run_tasks(PlainAnswers(model, batch_size), tokenizer, tasks, lambda *_: None)


def test_the_likeliest_choice_is_the_answer(books_model, books_tokenizer, tmp_path):
    choices = ["the sea", "zzqx", "jumped"]
    items = [{"q": "They sailed across", "choices": choices, "gold": gold} for gold in range(3)]
    found = run(quiz(tmp_path, MANY + ACC, items), books_model, books_tokenizer)["quiz"]
    assert (found.right, found.answers) == ((1, 0, 0), ("the sea",) * 3)
    assert found.prompts == ("They sailed across",) * 3


def test_the_answer_under_acc_norm_is_by_length(books_model, books_tokenizer, tmp_path):
    long = "nothing at all to his friend"
    items = [{"q": "He said", "choices": ["x", long], "gold": 1}]
    both = MANY + ACC.replace("]", ", {metric: acc_norm, aggregation: mean, higher_is_better: true}]")
    by_sum = run(quiz(tmp_path, MANY + ACC, items), books_model, books_tokenizer)["quiz"]
    by_length = run(quiz(tmp_path, both, items), books_model, books_tokenizer)["quiz"]
    assert (by_sum.metric, by_sum.answers, by_sum.right) == ("acc", ("x",), (0,))
    assert (by_length.metric, by_length.answers, by_length.right) == (
        "acc_norm",
        ("nothing at all to his friend",),
        (1,),
    )


def test_a_last_word_is_right_if_it_is_the_likeliest(books_model, books_tokenizer, task_dir):
    outcome = run(load_tasks(TaskOptions(("lambada_openai",), task_dir)), books_model, books_tokenizer)[
        "lambada_openai"
    ]
    words = [json.loads(line)["continuation"] for line in (task_dir / "lambada_openai.jsonl").read_text().splitlines()]
    for right, answer, word in zip(outcome.right, outcome.answers, words, strict=True):
        assert right == (answer == " " + word)
    assert len(set(outcome.answers)) > 3  # each wrong answer is the word that the model would have written


def test_written_answers_are_compared_as_text(books_model, books_tokenizer, tmp_path):
    settings = "generation_kwargs: {until: [' '], max_gen_toks: 6, do_sample: false}\n"
    tasks = quiz(tmp_path, WRITTEN + settings + MATCH, [{"q": "It was", "a": "?"}])
    (answer,) = run(tasks, books_model, books_tokenizer)["quiz"].answers
    tasks = quiz(tmp_path, WRITTEN + settings + MATCH, [{"q": "It was", "a": answer}, {"q": "It was", "a": "?"}])
    assert run(tasks, books_model, books_tokenizer)["quiz"].right == (1, 0)


def test_a_filter_of_the_task_is_applied(books_model, books_tokenizer, tmp_path):
    settings = "generation_kwargs: {until: [], max_gen_toks: 3, do_sample: false}\n"
    upper = "filter_list: [{name: loud, filter: [{function: uppercase}, {function: take_first}]}]\n"
    plain = quiz(tmp_path, WRITTEN + settings + MATCH, [{"q": "It was", "a": "?"}])
    (answer,) = run(plain, books_model, books_tokenizer)["quiz"].answers
    loud = quiz(tmp_path, WRITTEN + settings + MATCH + upper, [{"q": "It was", "a": answer.upper()}])
    found = run(loud, books_model, books_tokenizer)["quiz"]
    assert (found.answers, found.right) == ((answer.upper(),), (1,))


def test_outcomes_are_those_of_the_harnesss_own_loop(books_model, books_tokenizer, task_dir):
    tasks = load_tasks(TaskOptions(("quick", "arc_easy"), task_dir))
    mine = run(tasks, books_model, books_tokenizer)
    adapter = HarnessModel(PlainAnswers(books_model, 4), books_tokenizer)
    with quiet_libraries():
        found = evaluate(adapter, {"tasks": {task.name: task.task for task in tasks.tasks}}, bootstrap_iters=0)
    for name, outcome in mine.items():
        share = sum(outcome.right) / len(outcome.right)
        assert found["results"][name][f"{outcome.metric},none"] == pytest.approx(share)


def test_a_second_run_and_another_batch_size_give_the_same(books_model, books_tokenizer, task_dir):
    tasks = load_tasks(TaskOptions(("quick",), task_dir))
    assert run(tasks, books_model, books_tokenizer) == run(tasks, books_model, books_tokenizer)
    assert (
        run(tasks.first(5), books_model, books_tokenizer, 1)["piqa"].right
        == run(tasks, books_model, books_tokenizer)["piqa"].right[:5]
    )


def test_progress_counts_the_requests_of_all_tasks(books_model, books_tokenizer, tmp_path, task_dir):
    settings = "generation_kwargs: {until: [], max_gen_toks: 1, do_sample: false}\n"
    written = quiz(tmp_path, WRITTEN + settings + MATCH, [{"q": "It was", "a": "?"}])
    tasks = TaskSet(load_tasks(TaskOptions(("piqa",), task_dir)).tasks + written.tasks)
    told: list[tuple[int, int]] = []
    run_tasks(PlainAnswers(books_model, 2), books_tokenizer, tasks, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (25, 25) == (tasks.requests, tasks.requests)
    assert {total for _, total in told} == {25}


def test_a_metric_that_is_not_right_or_wrong_is_refused_by_its_values(books_model, books_tokenizer, tmp_path):
    (tmp_path / "quiz_code.py").write_text("def results(doc, found):\n    return {'mine': doc['gold'] / 2}\n")
    text = MANY + "process_results: !function quiz_code.results\n" + ACC.replace("acc", "mine")
    items = [{"q": "He", "choices": ["a", "b"], "gold": 0}]
    tasks = quiz(tmp_path, text, items, allow_code=True)
    assert run(tasks, books_model, books_tokenizer)["quiz"].metric == "mine"
    tasks = quiz(tmp_path, text, [*items, {**items[0], "gold": 1}], allow_code=True)
    with pytest.raises(UsageError, match=r"its metric mine does not call an item right or wrong, but 0\.5"):
        run(tasks, books_model, books_tokenizer)


def test_sampling_is_refused(books_model, books_tokenizer, tmp_path):
    settings = "generation_kwargs: {until: [], do_sample: true, temperature: 0.5}\n"
    tasks = quiz(tmp_path, WRITTEN + settings + MATCH, [{"q": "It was", "a": "?"}])
    with pytest.raises(UsageError, match="compared greedy only"):
        run(tasks, books_model, books_tokenizer)


def test_logits_that_are_not_numbers_are_an_error(books_5m, books_tokenizer, task_dir):
    broken = load_model(books_5m, torch.float32, "cpu")
    broken.blocks[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericsError, match="logits are NaN or infinite"):
        run(load_tasks(TaskOptions(("piqa",), task_dir)), broken, books_tokenizer)


def test_choices_that_begin_alike_are_different_answers(books_model, books_tokenizer, tmp_path):
    start = "the same words " * 30
    item = {"q": "He said", "choices": [start + "here", start + "there"], "gold": 0}
    tasks = quiz(tmp_path, MANY + ACC, [item, {**item, "choices": item["choices"][::-1]}])
    first, second = run(tasks, books_model, books_tokenizer)["quiz"].answers
    assert first == second
    assert first in item["choices"]


def test_of_long_prompts_the_end_is_kept(books_model, books_tokenizer, tmp_path):
    items = [{"q": "word " * 400 + "end?", "choices": ["a", "b"], "gold": 0}]
    found = run(quiz(tmp_path, MANY + ACC, items), books_model, books_tokenizer)["quiz"]
    assert len(found.prompts[0]) == PROMPT_CHARS
    assert found.prompts[0].endswith("word end?")
