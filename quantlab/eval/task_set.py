"""Tasks by name, made ready to ask: found, checked, their data read and every prompt built, before a model is loaded.

The harness's own tasks are only looked at for a name that is neither bundled nor in the user's folder: indexing them
takes many seconds, and their data come from the hub. Knows nothing about models.
"""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval.utils
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.instance import Instance
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask

from quantlab.errors import QuantlabError, UsageError, did_you_mean, nearest
from quantlab.eval.harness_tasks import build, harness_file, harness_group, harness_names
from quantlab.eval.options import TaskOptions
from quantlab.eval.task_data import loader
from quantlab.eval.task_files import (
    SUFFIXES,
    TaskFile,
    bundled_folder,
    check_sources,
    find_files,
    locate_data,
    read_task_file,
)

# The metrics that call an item right or wrong, the one to compare models on first.
RIGHT_OR_WRONG = ("acc_norm", "acc", "exact_match", "acc_bytes", "acc_mutual_info")
FEWSHOT_SEED = 1234  # the harness's own
UNREACHABLE = ("DatasetNotFoundError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "HfHubHTTPError")
NOISY_LIBRARIES = ("lm_eval", "datasets", "huggingface_hub", "fsspec", "httpx2")


@dataclass(frozen=True, slots=True)
class PreparedTask:
    """One task, the metric to compare on, and its items: the requests of each, in the order of the data."""

    name: str
    task: ConfigurableTask
    metric: str
    items: tuple[tuple[Instance, ...], ...]
    digests: tuple[str, ...]  # of each item: all that is asked, and what counts as right
    rules: str  # how an answer is judged

    @property
    def digest(self) -> str:
        """What the items, the rules, the metric and the harness's version make of it, as one sha256."""
        parts = [lm_eval.__version__, self.name, self.metric, self.rules, *self.digests]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks ready to be asked."""

    tasks: tuple[PreparedTask, ...]

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each task."""
        return {task.name: task.metric for task in self.tasks}

    @property
    def digests(self) -> dict[str, str]:
        """What each task's outcomes depend on, the model apart."""
        return {task.name: task.digest for task in self.tasks}

    @property
    def requests(self) -> int:
        """How many requests all items make together."""
        return sum(len(item) for task in self.tasks for item in task.items)

    def only(self, names: Sequence[str]) -> "TaskSet":
        """Those tasks alone."""
        return TaskSet(tuple(task for task in self.tasks if task.name in names))

    def first(self, count: int) -> "TaskSet":
        """At most `count` items of each task."""
        return TaskSet(tuple(replace(t, items=t.items[:count], digests=t.digests[:count]) for t in self.tasks))


class Templates(SandboxedEnvironment):
    """The harness's templates without access to Python's insides, each compiled once.

    A task file is data: its templates must not run code, and the harness compiles them anew for every item.
    """

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.filters["regex_replace"] = lm_eval.utils.regex_replace
        self.compiled: dict[str, Template] = {}

    def from_string(self, source: Any, globals: Any = None, template_class: Any = None) -> Template:
        """The template of a text."""
        if source not in self.compiled:
            self.compiled[source] = super().from_string(source, globals, template_class)
        return self.compiled[source]


def load_tasks(request: TaskOptions) -> TaskSet:
    """Every task that `request` names, ready to ask.

    Raises UsageError for an unknown task, for data that are missing, damaged or out of reach, for code that is not
    allowed, and for a task that does not call its items right or wrong.
    """
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"{request.limit} items are none", where="--limit")
    lm_eval.utils.env = Templates()
    with quiet_libraries():
        files = find_files(request.task_dir, request.allow_code)
        tasks: dict[str, ConfigurableTask] = {}
        for name in request.names:
            for task in _named(name, request, files):
                tasks.setdefault(task.task_name, task)
        prepared = tuple(_prepare(name, task, request.limit) for name, task in tasks.items())
    if not prepared:
        raise UsageError("no task was named", where="--tasks", fix="--tasks piqa, or --suite core")
    return TaskSet(prepared)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps progress bars and log lines of the libraries off the user's terminal; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in NOISY_LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _named(name: str, request: TaskOptions, files: Mapping[str, TaskFile]) -> Iterator[ConfigurableTask]:
    """The tasks of one name that the user gave: a path, a local or bundled name, one of the harness's own."""
    if name.endswith(SUFFIXES):
        path = Path(name)
        beside = find_files(path.parent, request.allow_code) if path.is_file() else {}
        yield from _expand(read_task_file(path, request.allow_code), request, {**files, **beside})
    elif name in files and not _is_the_harnesses_to_fetch(files[name], request):
        yield from _expand(files[name], request, files)
    elif name in harness_names():
        yield from _from_harness(name)
    else:
        raise UsageError(f"unknown task '{name}'{_suggestion(name, files)}", where="--suite or --tasks")


def _is_the_harnesses_to_fetch(file: TaskFile, request: TaskOptions) -> bool:
    """Whether a bundled task has no local data to ask about while the harness knows where the hub keeps them."""
    bundled = file.path.parent == bundled_folder()
    return bundled and request.task_dir is None and file.members is None and file.name in harness_names()


def _suggestion(name: str, files: Mapping[str, TaskFile]) -> str:
    """The nearest local name before the nearest of the harness's thousands."""
    close = nearest(name, files) or nearest(name, harness_names())
    return f", did you mean '{close}'?" if close else did_you_mean(name, files)


def _expand(
    file: TaskFile, request: TaskOptions, files: Mapping[str, TaskFile], above: tuple[str, ...] = ()
) -> Iterator[ConfigurableTask]:
    """A task, or those of a group and of the groups in it."""
    if file.members is None:
        yield _build(file, request.task_dir)
        return
    if file.name in above:
        raise UsageError(f"the group '{file.name}' holds itself", where=str(file.path))
    for member in file.members:
        entry = {"task": member} if isinstance(member, str) else member
        name = entry.get("task", entry.get("group")) if isinstance(entry, dict) else None
        if isinstance(name, str) and name in files:
            changed = {**files[name].config, **{key: value for key, value in entry.items() if key != "group"}}
            merged = files[name].config if files[name].members is not None else changed
            yield from _expand(TaskFile(name, files[name].path, merged), request, files, (*above, file.name))
        elif isinstance(name, str) and name in harness_names():
            yield from _from_harness(name)
        else:
            unknown = name if isinstance(name, str) else str(member)
            raise UsageError(f"unknown task '{unknown}'{_suggestion(unknown, files)}", where=str(file.path))


def _from_harness(name: str) -> Iterator[ConfigurableTask]:
    try:
        file = harness_file(name)
        if file is None:
            yield from harness_group(name)
            return
    except Exception as error:  # the harness runs its tasks' own code, which may raise anything
        raise _told(name, error) from error
    check_sources(file)
    yield _built(name, file.config)


def _build(file: TaskFile, task_dir: Path | None) -> ConfigurableTask:
    """The harness's task of one file, its data read."""
    check_sources(file)
    splits = locate_data(file, task_dir)
    config = dict(file.config)
    if splits is not None and config["dataset_path"] == "json":
        config |= {"custom_dataset": loader(splits), "dataset_path": None, "dataset_kwargs": None}
    elif splits is not None:
        places = {split: [str(path) for path in paths] for split, paths in splits.items()}
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": places}
    return _built(file.name, config)


def _built(name: str, config: Mapping[str, Any]) -> ConfigurableTask:
    try:
        return build(dict(config))
    except Exception as error:  # a task's templates and code may raise anything
        raise _told(name, error) from error


def _prepare(name: str, task: ConfigurableTask, limit: int | None) -> PreparedTask:
    """Every request of a task's items, built once for all models."""
    metric = _metric(name, task)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        task.build_all_requests(limit=limit)
        items: dict[int, list[Instance]] = {}
        for instance in task.instances:
            items.setdefault(instance.doc_id, []).append(instance)
        digests = tuple(_digest(task, asked) for asked in items.values())
        rules = _rules(task)
    except Exception as error:  # a task's templates and code may raise anything
        raise _told(name, error) from error
    return PreparedTask(name, task, metric, tuple(tuple(asked) for asked in items.values()), digests, rules)


def _metric(name: str, task: ConfigurableTask) -> str:
    """The metric to compare models on; raises UsageError where a task has none that calls an item right or wrong."""
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise UsageError("needs pictures or sound, or runs what the model writes", where=f"task '{name}'")
    measured = list(task.aggregation())
    own = [metric for metric in measured if metric not in metric_registry]
    usable = [metric for metric in RIGHT_OR_WRONG if metric in measured] + own
    if task.OUTPUT_TYPE == "loglikelihood_rolling" or not usable:
        what = f"it measures {', '.join(measured)}, which call no item right or wrong"
        raise UsageError(what, where=f"task '{name}'", fix="--text, for perplexity")
    return usable[0]


def _digest(task: ConfigurableTask, asked: Sequence[Instance]) -> str:
    """All that is asked about one item, and what counts as right: 128 bits of sha256."""
    doc = asked[0].doc
    right = [task.doc_to_target(doc), task.doc_to_text(doc)]
    requests = [[instance.request_type, *instance.args] for instance in asked]
    return hashlib.sha256(json.dumps([right, requests], default=str).encode()).hexdigest()[:32]


def _rules(task: ConfigurableTask) -> str:
    """How a task judges an answer, as text: filters, metrics with their settings, and the source of its own code."""
    config = task.config
    stated = [config.output_type, config.filter_list, config.metric_list, config.process_results]
    return json.dumps(stated, default=config.serialize_function)


def _told(name: str, error: Exception) -> QuantlabError:
    """Whatever a library raised, as one line."""
    if isinstance(error, QuantlabError):
        return error
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, ConnectionError) or type(error).__name__ in UNREACHABLE:
        message = f"its data are on the Hugging Face hub, which cannot be reached ({lines[0][:200]})"
        return UsageError(message, where=f"task '{name}'", fix="--task-dir with local data, or another --tasks")
    return UsageError(f"cannot be made ready: {type(error).__name__}: {lines[0][:300]}", where=f"task '{name}'")
