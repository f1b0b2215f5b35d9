"""The harness's own tasks are found by name without parsing its thousands of files."""

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind

from quantlab.eval.harness_tasks import harness_file, harness_group, harness_names


def test_tasks_have_files_and_groups_have_none():
    names = harness_names()
    assert names["arc_challenge"].name == "arc_challenge.yaml"
    assert (names["ai2_arc"], names["mmlu"]) == (None, None)


def test_a_tasks_file_is_read_with_its_functions():
    file = harness_file("winogrande")
    assert callable(file.config["doc_to_text"])
    assert harness_file("mmlu") is None
    with pytest.raises(KeyError):
        harness_file("no such task")


@pytest.mark.slow
def test_every_name_of_the_harnesss_own_index_is_found_in_the_same_file():
    index, names = TaskManager().task_index, harness_names()
    assert len(index) > 10_000
    for name, entry in index.items():
        assert name in names
        assert names[name] == (entry.yaml_path if entry.kind in (Kind.TASK, Kind.PY_TASK) else None)


def test_an_unknown_group_is_a_key_error(monkeypatch):
    monkeypatch.setattr("quantlab.eval.harness_tasks.TaskManager", lambda: TaskManager(include_defaults=False))
    with pytest.raises(KeyError):
        harness_group("no such group")
