"""The tasks that come with lm-evaluation-harness, found by reading its thousands of files as text.

The harness's own index parses every one of them, which takes ten seconds; it is made only for a group. These files are
part of an installed library: the functions that they name are as trusted as the library itself.
Knows nothing about the user's own task files.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from quantlab.eval.task_files import SUFFIX, TaskFile

KEY = r"^[\"']?(?P<key>task|group|tag)[\"']?:"
NAME = re.compile(KEY + r"[ \t]+(?P<name>[^\s\[{&|>#][^#\n]*)", re.MULTILINE)
LISTED = re.compile(KEY + r"[ \t]*\n(?P<names>(?:[ \t]*- .*\n?)+)", re.MULTILINE)


@cache
def harness_names() -> dict[str, Path | None]:
    """Every task's name with its file; groups and tags, which may be of several files, with None."""
    names: dict[str, Path | None] = {}
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*")):
        if path.suffix not in (SUFFIX, "") or not path.is_file():
            continue
        for key, name in _named(path.read_text(encoding="utf-8")):
            if key != "task":
                names[name] = None
            elif path.suffix == SUFFIX:  # others are only included
                names.setdefault(name, path)
    return names


def harness_file(name: str) -> TaskFile | None:
    """The file of one of the harness's own tasks; None for its groups and tags. Raises KeyError for an unknown name."""
    path = harness_names()[name]
    return None if path is None else TaskFile(name, path, load_yaml(path))


def harness_group(name: str) -> list[Task]:
    """All tasks of one of the harness's own groups or tags, with their data."""
    return list(TaskManager().load([name])["tasks"].values())


def build(config: dict[str, object]) -> ConfigurableTask:
    """The harness's task of one configuration."""
    (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    return task


def _named(text: str) -> Iterator[tuple[str, str]]:
    """(key, name) of what a file defines."""
    for match in NAME.finditer(text):
        yield match["key"], match["name"].strip().strip("\"'")
    for match in LISTED.finditer(text):
        if match["key"] == "tag":  # a group's list of tasks names nothing new
            yield from (("tag", line.strip(" \t-\"'")) for line in match["names"].splitlines())
