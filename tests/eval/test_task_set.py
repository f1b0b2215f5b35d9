"""Tasks by name: found or refused in one line, built once, and known by a digest of all that they ask."""

import json
from pathlib import Path

import pytest

from quantlab.errors import UsageError
from quantlab.eval import task_set
from quantlab.eval.options import TaskOptions
from quantlab.eval.task_set import TaskSet, load_tasks

QUIZ = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{ question }}?"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ITEMS = [{"question": f"Is {i} even", "choices": ["yes", "no"], "label": i % 2} for i in range(5)]


@pytest.fixture
def quiz_dir(tmp_path: Path) -> Path:
    (tmp_path / "quiz.yaml").write_text(QUIZ)
    write_items(tmp_path, ITEMS)
    return tmp_path


def write_items(folder: Path, items: list[dict]) -> None:
    (folder / "quiz.jsonl").write_text("\n".join(json.dumps(item) for item in items))


def load(folder: Path, *names: str, limit: int | None = None, allow_code: bool = False) -> TaskSet:
    return load_tasks(TaskOptions(names or ("quiz",), folder, limit, allow_code))


def refused(folder: Path | None, *names: str) -> str:
    with pytest.raises(UsageError) as error:
        load_tasks(TaskOptions(names or ("quiz",), folder))
    line = error.value.one_line()
    assert "\n" not in line
    return line


def test_a_users_task_is_ready_to_ask(quiz_dir):
    (quiz,) = load(quiz_dir).tasks
    assert (quiz.name, quiz.metric, len(quiz.items)) == ("quiz", "acc", 5)
    assert [instance.args for instance in quiz.items[1]] == [("Is 1 even?", " yes"), ("Is 1 even?", " no")]


def test_a_task_file_is_asked_by_its_path(quiz_dir, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    (quiz_dir / "quiz.jsonl").rename(other / "quiz.jsonl")
    (quiz_dir / "both.yaml").write_text("group: both\ntask: [quiz, {task: quiz, num_fewshot: 0}]\n")
    (quiz_dir / "quiz.yaml").rename(quiz_dir / "quiz.yml")
    for name in ("quiz.yml", "both.yaml"):
        assert load(other, str(quiz_dir / name)).metrics == {"quiz": "acc"}


def test_the_limit_takes_the_first_items(quiz_dir):
    assert [len(load(quiz_dir, limit=limit).tasks[0].items) for limit in (1, 3, 99)] == [1, 3, 5]
    assert load(quiz_dir, limit=3).digests == load(quiz_dir).first(3).digests
    with pytest.raises(UsageError, match="0 items are none"):
        load(quiz_dir, limit=0)


def test_a_group_is_its_tasks_and_nothing_is_asked_twice(task_dir):
    assert list(load(task_dir, "quick").metrics) == ["lambada_openai", "piqa", "winogrande"]
    found = load(task_dir, "piqa", "quick", "arc_easy")
    assert list(found.metrics.items()) == [
        ("piqa", "acc_norm"), ("lambada_openai", "acc"), ("winogrande", "acc"), ("arc_easy", "acc_norm"),
    ]  # fmt: skip
    assert list(found.only(["winogrande"]).metrics) == ["winogrande"]
    assert found.only(["winogrande"]).requests == 2 * 12


def test_a_group_changes_settings_of_its_tasks(quiz_dir):
    (quiz_dir / "g.yaml").write_text("group: g\ntask: [{task: quiz, target_delimiter: ': '}]\n")
    assert load(quiz_dir, "g").tasks[0].items[0][0].args == ("Is 0 even?", ": yes")


def test_groups_hold_groups_but_not_themselves(quiz_dir):
    (quiz_dir / "a.yaml").write_text("group: a\ntask: [{group: b}]\n")
    (quiz_dir / "b.yaml").write_text("group: b\ntask: [quiz]\n")
    assert list(load(quiz_dir, "a").metrics) == ["quiz"]
    (quiz_dir / "b.yaml").write_text("group: b\ntask: [quiz, a]\n")
    assert "the group 'a' holds itself" in refused(quiz_dir, "a")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("quizz", "unknown task 'quizz', did you mean 'quiz'?"),
        ("winogrand", "did you mean 'winogrande'?"),
        ("arc_chalenge", "did you mean 'arc_challenge'?"),
        ("xyzzyplugh", "unknown task 'xyzzyplugh' (known: arc_easy, boolq,"),
    ],
)
def test_an_unknown_task_is_one_line_with_the_nearest_name(quiz_dir, name, told):
    line = refused(quiz_dir, name)
    assert line.startswith("QL0002 --suite or --tasks: ")
    assert told in line


def test_an_unknown_member_of_a_group_is_named_with_its_file(quiz_dir):
    (quiz_dir / "g.yaml").write_text("group: g\ntask: [quizzz]\n")
    assert f"{quiz_dir / 'g.yaml'}: unknown task 'quizzz', did you mean 'quiz'?" in refused(quiz_dir, "g")
    (quiz_dir / "g.yaml").write_text("group: g\ntask: [3]\n")
    assert "unknown task '3'" in refused(quiz_dir, "g")


def test_nothing_named_is_nothing_to_do(quiz_dir):
    with pytest.raises(UsageError, match="no task was named"):
        load_tasks(TaskOptions(()))


def test_data_that_are_missing_name_the_file(quiz_dir):
    (quiz_dir / "quiz.jsonl").unlink()
    assert f"'quiz.jsonl' is not in {quiz_dir}" in refused(quiz_dir)
    assert "hellaswag_1000.jsonl" in refused(None, "hellaswag_1000")


@pytest.mark.parametrize("name", ["arc_easy", pytest.param("ai2_arc", marks=pytest.mark.slow)])
def test_data_on_the_hub_that_cannot_be_reached_are_one_line(name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(None, name)
    assert "its data are on the Hugging Face hub, which cannot be reached" in line
    assert line.endswith("try: --task-dir with local data, or another --tasks")


def test_code_is_refused_unless_allowed(quiz_dir):
    (quiz_dir / "quiz_code.py").write_text("def text(doc):\n    return 'asked by code'\n")
    (quiz_dir / "quiz.yaml").write_text(QUIZ.replace('"{{ question }}?"', "!function quiz_code.text"))
    assert "!function" in refused(quiz_dir)
    assert load(quiz_dir, allow_code=True).tasks[0].items[0][0].args[0] == "asked by code"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ question.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
        "{{ absent }}",
        "{{ question | absent }}",
        "{{ question",
    ],
)
def test_templates_reach_nothing_but_the_item(quiz_dir, template, monkeypatch):
    monkeypatch.chdir(quiz_dir)
    (quiz_dir / "quiz.yaml").write_text(QUIZ.replace("{{ question }}?", template))
    assert "task 'quiz': cannot be made ready" in refused(quiz_dir)
    assert not (quiz_dir / "ran").exists()


def test_a_task_without_right_and_wrong_is_refused(quiz_dir):
    rolling = QUIZ.replace("multiple_choice", "loglikelihood_rolling").replace("metric: acc", "metric: word_perplexity")
    (quiz_dir / "quiz.yaml").write_text(rolling.replace("doc_to_choice: choices\n", ""))
    line = refused(quiz_dir)
    assert "it measures word_perplexity, which call no item right or wrong" in line
    assert line.endswith("try: --text, for perplexity")


def test_broken_items_are_refused(quiz_dir):
    write_items(quiz_dir, [{"question": "q", "choices": "abc", "label": 0, "x": 1}, *ITEMS])
    assert "differ in their keys: x" in refused(quiz_dir)
    write_items(quiz_dir, [{**ITEMS[0], "choices": 3}])
    assert "task 'quiz': cannot be made ready" in refused(quiz_dir)


def test_other_local_formats_are_read_from_the_folder(quiz_dir):
    (quiz_dir / "quiz.csv").write_text("question,label\nIs it,0\nWas it,1\n")
    text = QUIZ.replace("quiz.jsonl", "quiz.csv").replace("path: json", "path: csv")
    (quiz_dir / "quiz.yaml").write_text(text.replace("choices\n", "['yes', 'no']\n"))
    assert [item[0].args[0] for item in load(quiz_dir).tasks[0].items] == ["Is it?", "Was it?"]


def test_the_digest_is_of_everything_that_is_asked(quiz_dir):
    first = load(quiz_dir).digests["quiz"]
    assert load(quiz_dir).digests["quiz"] == first

    def changed(text: str = QUIZ, items: list[dict] = ITEMS) -> str:
        (quiz_dir / "quiz.yaml").write_text(text)
        write_items(quiz_dir, items)
        return load(quiz_dir).digests["quiz"]

    others = {
        changed(QUIZ.replace("}}?", "}} ?")),
        changed(QUIZ.replace("metric: acc", "metric: acc_norm")),
        changed(items=[*ITEMS[:-1], {**ITEMS[-1], "label": 1}]),
        changed(items=[*ITEMS[:-1], {**ITEMS[-1], "choices": ["yes", "nope"]}]),
        changed(items=ITEMS[:-1]),
        changed(items=ITEMS[::-1]),
    }
    assert len(others | {first}) == 7
    assert changed(items=[dict(reversed(item.items())) for item in ITEMS]) == first


WRITTEN = (
    QUIZ.replace("multiple_choice", "generate_until")
    .replace("doc_to_choice: choices\n", "")
    .replace("metric: acc", "metric: exact_match")
)
DIGITS = """\
filter_list:
  - name: digits
    filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]
"""


def test_the_digest_is_of_how_answers_are_judged(quiz_dir):
    """What was kept of a baseline under other rules must not be compared with a candidate under these."""

    def digest(text: str) -> str:
        (quiz_dir / "quiz.yaml").write_text(text)
        return load(quiz_dir, allow_code=True).digests["quiz"]

    code = WRITTEN + "process_results: !function rules.judge\n"
    (quiz_dir / "rules.py").write_text("def judge(doc, answers):\n    return {'exact_match': 1}\n")
    texts = [WRITTEN, WRITTEN.replace("exact_match,", "exact_match, ignore_case: true,"), WRITTEN + DIGITS, code]
    found = [digest(text) for text in texts]
    assert found == [digest(text) for text in texts]
    assert len(set(found)) == len(texts)


def test_few_shot_examples_are_the_same_in_every_run(quiz_dir):
    (quiz_dir / "quiz.yaml").write_text(QUIZ + "num_fewshot: 2\nfewshot_split: test\n")
    first, again = load(quiz_dir), load(quiz_dir)
    assert first.digests == again.digests
    assert first.tasks[0].items[0][0].args[0].count("even?") == 3


def test_loading_writes_nothing_to_the_terminal(task_dir, capsys):
    load(task_dir, "quick")
    assert capsys.readouterr() == ("", "")


def test_templates_are_compiled_once(quiz_dir, monkeypatch):
    compiled = []
    inner = task_set.SandboxedEnvironment.from_string
    monkeypatch.setattr(
        task_set.SandboxedEnvironment,
        "from_string",
        lambda self, text, *rest: compiled.append(text) or inner(self, text),
    )
    load(quiz_dir)
    assert compiled == ["{{ question }}?"]
