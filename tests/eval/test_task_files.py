"""Task files are data: what runs code, reaches elsewhere or is no task is refused in one line."""

from pathlib import Path

import pytest

from quantlab.errors import UsageError
from quantlab.eval.task_files import TaskFile, check_sources, find_files, locate_data, read_task_file

PLAIN = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: mine.jsonl}}\n"


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(path: Path, allow_code: bool = False) -> str:
    with pytest.raises(UsageError) as error:
        check_sources(read_task_file(path, allow_code))
    line = error.value.one_line()
    assert "\n" not in line
    return line


def test_a_file_is_read_as_data(tmp_path):
    file = read_task_file(write(tmp_path, PLAIN), False)
    assert (file.name, file.members, file.config["dataset_path"]) == ("mine", None, "json")


def test_a_function_is_refused_before_anything_is_imported(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return 'x'\n")
    path = write(tmp_path, PLAIN + "doc_to_text: !function evil.text\n")
    line = refused(path)
    assert f"{path}:4:14: names Python code (!function)" in line
    assert line.endswith("try: --allow-task-code, if you trust this folder")
    assert not (tmp_path / "ran").exists()


def test_a_function_in_an_included_file_is_refused_too(tmp_path):
    base = write(tmp_path, "process_docs: !function evil.docs\n", "base.inc")
    line = refused(write(tmp_path, PLAIN + "include: base.inc\n"))
    assert f"{base}:1:15" in line


def test_a_function_is_loaded_when_the_user_allows_it(tmp_path):
    (tmp_path / "mine_code.py").write_text("def text(doc):\n    return 'read ' + doc['a']\n")
    file = read_task_file(write(tmp_path, PLAIN + "doc_to_text: !function mine_code.text\n"), True)
    assert file.config["doc_to_text"]({"a": "b"}) == "read b"


def test_allowed_code_that_cannot_be_loaded_is_one_line(tmp_path):
    line = refused(write(tmp_path, PLAIN + "doc_to_text: !function absent_module.text\n"), allow_code=True)
    assert "its code cannot be loaded: ImportError" in line


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!include x.yaml", "!!python/name:os.system"]
)
def test_other_tags_are_no_way_in(tmp_path, tag):
    assert "Python code" in (line := refused(write(tmp_path, PLAIN + f"x: {tag}\n"))) or "is not allowed" in line


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            "metric_list: [{metric: exact_match, hf_evaluate: true}]",
            "a metric whose code comes from the Hugging Face hub",
        ),
        ("metric_list: [{metric: ./my_metric.py}]", "unknown metric './my_metric.py'"),
        ("metric_list: [{metric: exactmatch}]", "unknown metric 'exactmatch', did you mean 'exact_match'?"),
        ("metric_list: [accuracy]", "unknown metric 'accuracy'"),
        ("unsafe_code: true", "running what the model writes"),
        ("use_prompt: promptsource:x", "prompts of the promptsource package"),
    ],
)
def test_code_from_elsewhere_is_refused_even_when_code_is_allowed(tmp_path, more, told):
    assert told in refused(write(tmp_path, f"{PLAIN}{more}\n"), allow_code=True)


@pytest.mark.parametrize("source", ["pandas", "webdataset", "./script.py", "/etc", "../up", "a/b/c", "~/x", "eval"])
def test_data_in_formats_that_may_hold_code_are_refused(tmp_path, source):
    line = refused(write(tmp_path, f"task: mine\ndataset_path: {source}\n"))
    assert "dataset_path is neither a local format nor owner/name on the hub" in line


def test_data_on_the_hub_and_local_formats_are_let_through(tmp_path):
    for source in ("allenai/ai2_arc", "json", "text", "csv", "parquet"):
        file = read_task_file(write(tmp_path, f"task: mine\ndataset_path: {source}\n"), False)
        check_sources(file)
        assert file.config["dataset_path"] == source


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("- task\n", "a task is a mapping of keys"),
        ("output_type: multiple_choice\n", "names neither a task nor a group"),
        ("task: [a, b]\n", "names neither a task nor a group"),
        ("group: g\ntask: a\n", "a group lists its tasks"),
        ("task: {", "not YAML"),
        ("task: a\ntask: b\n", "duplicate key 'task', first set on line 1"),
        ("task: &x a\nb: *x\n", "anchors and aliases are not allowed"),
    ],
)
def test_what_is_no_task_file_is_refused(tmp_path, text, told):
    assert told in refused(write(tmp_path, text))


def test_an_included_file_comes_first_and_may_include_others(tmp_path):
    write(tmp_path, "test_split: test\nnum_fewshot: 1\n", "one.inc")
    write(tmp_path, "include: one.inc\nnum_fewshot: 2\ndescription: two\n", "two.inc")
    config = read_task_file(write(tmp_path, PLAIN + "include: [two.inc]\nnum_fewshot: 3\n"), False).config
    assert (config["test_split"], config["num_fewshot"], config["description"]) == ("test", 3, "two")


def test_files_that_include_each_other_are_refused(tmp_path):
    write(tmp_path, "include: mine.yaml\n", "other.yaml")
    assert "include each other" in refused(write(tmp_path, PLAIN + "include: other.yaml\n"))


def test_a_users_file_goes_before_a_bundled_one_of_the_same_name(tmp_path):
    write(tmp_path, PLAIN.replace("mine", "piqa"), "p.yaml")
    assert find_files(tmp_path, False)["piqa"].path == tmp_path / "p.yaml"
    assert find_files(None, False)["piqa"].path != tmp_path / "p.yaml"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="there is no such folder") as error:
        find_files(tmp_path / "absent", False)
    assert error.value.where == f"--task-dir {tmp_path / 'absent'}"


def mine(folder: Path, data_files: object) -> TaskFile:
    config = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": data_files}}
    return TaskFile("mine", folder / "mine.yaml", config)


def test_data_lie_in_the_task_folder_or_beside_the_file(tmp_path):
    first, second = tmp_path / "data", tmp_path / "files"
    for folder, name in ((first, "a"), (second, "a"), (second, "b")):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").touch()
    found = locate_data(mine(second, {"test": ["a.jsonl", "b.jsonl"]}), first)
    assert found == {"test": [first / "a.jsonl", second / "b.jsonl"]}
    assert locate_data(mine(second, "b.jsonl"), None) == {"train": [second / "b.jsonl"]}


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../mine.jsonl", "a/../../b", "https://host/x.jsonl", "hf://datasets/x"]
)
def test_data_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match="must be a path inside"):
        locate_data(mine(tmp_path, {"test": name}), tmp_path)


@pytest.mark.parametrize("names", [None, [], 7, {"test": None}, {"test": [""]}])
def test_data_that_are_not_named_are_asked_for(tmp_path, names):
    with pytest.raises(UsageError, match="dataset_kwargs needs data_files"):
        locate_data(mine(tmp_path, names), tmp_path)


def test_a_bundled_task_without_data_says_where_it_looks(tmp_path):
    bundled = find_files(None, False)["piqa"]
    with pytest.raises(UsageError) as error:
        locate_data(bundled, tmp_path)
    told = (
        f"QL0002 --tasks piqa: 'piqa.jsonl' is not in {tmp_path}; try: --task-dir with the folder that holds piqa.jsonl"
    )
    assert error.value.one_line() == told
    with pytest.raises(UsageError, match="the task 'piqa' needs its data, 'piqa.jsonl'"):
        locate_data(bundled, None)
