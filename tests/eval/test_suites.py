"""The bundled tasks ask what the harness's own ask: the same prompts, answers, metrics, from data in another layout."""

import json
from pathlib import Path

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from quantlab.eval.harness_tasks import build, harness_file
from quantlab.eval.options import TaskOptions
from quantlab.eval.task_files import bundled_folder, bundled_names, find_files
from quantlab.eval.task_set import load_tasks, quiet_libraries

CHOICES = ["Bring it home.", "Leave it, for [now] it's fine", "run  away"]
# Each bundled task: the harness's name of it, an item of its own layout, and the same item of the bundled one.
SAME_ITEMS = {
    "lambada_openai": (
        "lambada_openai",
        {"text": "\"Who's there?\" he said,  twice.\nThen it was Anna's turn"},
        {"context": "\"Who's there?\" he said,  twice.\nThen it was Anna's", "continuation": "turn"},
    ),
    "piqa": (
        "piqa",
        {"goal": "To dry a {cat}", "sol1": CHOICES[0], "sol2": CHOICES[1], "label": 1},
        {"query": "Question: To dry a {cat}\n", "choices": CHOICES[:2], "gold": 1},
    ),
    "arc_easy": (
        "arc_easy",
        {"question": "Is \\it warm?", "choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"query": "Question: Is \\it warm?", "choices": CHOICES, "gold": 2},
    ),
    "winogrande": (
        "winogrande",
        {"sentence": "The cup beat the box as _ was light, by far.", "option1": "cup", "option2": "box", "answer": "1"},
        {
            "context_options": ["The cup beat the box as cup", "The cup beat the box as box"],
            "continuation": "was light, by far.",
            "gold": 0,
        },
    ),
    "boolq": (
        "boolq",
        {"passage": "Passage: Ice -- is water,\n frozen.", "question": "is ice cold", "label": 1},
        {
            "query": "Passage: Passage: Ice -- is water,\n frozen.\nQuestion: is ice cold?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
    ),
    "copa": (
        "copa",
        {"premise": "Rain, because.", "question": "cause", "choice1": "Clouds.", "choice2": "We sang.", "label": 1},
        {"query": "Rain, because, because", "choices": ["clouds.", "we sang."], "gold": 1},
    ),
    "openbook_qa": (
        "openbookqa",
        {"question_stem": "Plants eat", "choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "B"},
        {"query": "Plants eat", "choices": CHOICES, "gold": 1},
    ),
    "hellaswag_1000": (
        "hellaswag",
        {
            "activity_label": "Roof [step] work", "ctx_a": " A man [title] climbs.", "ctx_b": "he IS up", "label": "2",
            "endings": [" [title] He falls.", "goes [substeps] up  and down", "sits."],
        },
        {
            "activity_label": "Roof [step] work", "ctx_a": " A man [title] climbs.", "ctx_b": "he IS up", "label": 2,
            "endings": [" [title] He falls.", "goes [substeps] up  and down", "sits."],
        },
    ),
}  # fmt: skip


def standard(name: str, item: dict) -> ConfigurableTask:
    """The harness's own task, asked about one item instead of its data on the hub."""
    config = dict(harness_file(name).config)
    rows = datasets.Dataset.from_list([item])
    splits = {config[key]: rows for key in ("training_split", "validation_split", "test_split") if config.get(key)}
    return build({**config, "custom_dataset": lambda **_: splits, "dataset_path": None})


def asked(task: ConfigurableTask) -> list:
    """Everything that one item makes a model do, and what counts as right."""
    with quiet_libraries():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=None)
    instance = task.instances[0]
    right = task.doc_to_text(instance.doc) if task.multiple_input else task.doc_to_target(instance.doc)
    choices = task.doc_to_choice(instance.doc) if task.OUTPUT_TYPE == "multiple_choice" else []
    number = choices.index(right) if right in choices else right  # some of the standard tasks name the choice itself
    return [*[(one.request_type, one.args) for one in task.instances], number]


@pytest.mark.parametrize("name", SAME_ITEMS)
def test_prompts_and_answers_are_the_standard_ones(name: str, tmp_path: Path) -> None:
    known_as, theirs, ours = SAME_ITEMS[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(ours))
    mine = load_tasks(TaskOptions((name,), tmp_path)).tasks[0].task
    assert asked(mine) == asked(standard(known_as, theirs))


@pytest.mark.parametrize("name", SAME_ITEMS)
def test_metrics_are_the_standard_ones(name: str) -> None:
    def measured(config: dict) -> list[str]:
        return [entry["metric"] for entry in config["metric_list"]]

    assert measured(find_files(None, False)[name].config) == measured(harness_file(SAME_ITEMS[name][0]).config)


def test_what_is_right_scores_one(tmp_path: Path) -> None:
    for name, (_, _, item) in SAME_ITEMS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(item))
    for prepared in load_tasks(TaskOptions(("core",), tmp_path)).tasks:
        (item,) = prepared.items
        right = prepared.task.doc_to_text(item[0].doc) if prepared.name == "winogrande" else None
        gold = prepared.task.doc_to_target(item[0].doc) if right is None else right
        best = [(-1.0 if i == gold or len(item) == 1 else -500.0, True) for i in range(len(item))]
        assert prepared.task.process_results(item[0].doc, best)[prepared.metric] == 1


def test_every_bundled_file_is_a_task_with_local_data_or_a_group_of_those() -> None:
    files = find_files(None, False)
    groups = {name: file.members for name, file in files.items() if file.members is not None}
    assert set(groups) == {"core", "quick"}
    assert set(groups["core"]) == set(SAME_ITEMS) == set(files) - set(groups)
    assert set(groups["quick"]) < set(groups["core"])
    assert set(files) == set(bundled_names())
    for name in SAME_ITEMS:
        assert files[name].config["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
        assert "!function" not in (bundled_folder() / f"{name}.yaml").read_text()
