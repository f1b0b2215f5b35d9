"""A model on prepared tasks: every request asked, every item called right or wrong by the task's own metric.

The baseline and its candidates answer the same requests, built once. Knows nothing about caches, gates or reports.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy
from lm_eval.api.instance import Instance

from quantlab.errors import UsageError
from quantlab.eval.answers import Answers
from quantlab.eval.harness import HarnessModel
from quantlab.eval.likelihood import Progress
from quantlab.eval.outcomes import TaskOutcome
from quantlab.eval.task_set import PreparedTask, TaskSet
from quantlab.text import Tokenizer

PROMPT_CHARS = 1000  # kept of each prompt, its end: few-shot examples would fill the cache


def run_tasks(answers: Answers, tokenizer: Tokenizer, tasks: TaskSet, on_progress: Progress) -> dict[str, TaskOutcome]:
    """What a model does on every task, by name; `on_progress` counts requests.

    Raises NumericsError for logits that are not numbers, UsageError for a task that wants more than greedy text.
    """
    asked = [instance for task in tasks.tasks for item in task.items for instance in item]
    done = 0

    def count(answered: int, _: int) -> None:
        on_progress(done + answered, len(asked))

    adapter = HarnessModel(answers, tokenizer, count)
    for kind in dict.fromkeys(instance.request_type for instance in asked):
        requests = [instance for instance in asked if instance.request_type == kind]
        for instance, response in zip(requests, getattr(adapter, kind)(requests), strict=True):
            instance.resps = [response] * instance.repeats  # greedy: asking again gives the same
            instance.filtered_resps = {}
        done += len(requests)
    return {task.name: _outcome(task, adapter) for task in tasks.tasks}


def _outcome(task: PreparedTask, adapter: HarnessModel) -> TaskOutcome:
    """A task whose requests are answered, item by item."""
    answer_filter = task.task._filters[0]  # where a task has several, the first is the one that it is reported by
    answer_filter.apply([instance for item in task.items for instance in item])
    right: list[Literal[0, 1]] = []
    answers: list[str] = []
    for item in task.items:
        responses = [instance.filtered_resps[answer_filter.name] for instance in item]
        right.append(_score(task, item[0].doc, responses))
        answers.append(_answer(task, item, responses, adapter))
    return TaskOutcome(
        task=task.name,
        metric=task.metric,
        data=task.digest,
        items=task.digests,
        right=tuple(right),
        answers=tuple(answers),
        prompts=tuple(str(item[0].args[0])[-PROMPT_CHARS:] for item in task.items),
    )


def _score(task: PreparedTask, doc: dict[str, Any], responses: Sequence[Any]) -> Literal[0, 1]:
    value = task.task.process_results(doc, responses).get(task.metric)
    if not isinstance(value, int | float | numpy.number) or value not in (0, 1):
        message = f"its metric {task.metric} does not call an item right or wrong, but {value!r}"
        raise UsageError(message, where=f"task '{task.name}'")
    return 1 if value else 0


def _answer(task: PreparedTask, item: Sequence[Instance], responses: Sequence[Any], adapter: HarnessModel) -> str:
    """What the model chose or wrote, for people and to see whether two models agree."""
    kind = task.task.OUTPUT_TYPE
    if kind == "generate_until":
        return str(responses[0])
    if kind == "loglikelihood":
        return adapter.likeliest[item[0].args]
    choices = task.task.doc_to_choice(item[0].doc)
    logprobs = numpy.array([response[0] for response in responses[: len(choices)]])
    lengths = {"acc_norm": [len(choice) for choice in choices], "acc_bytes": [len(c.encode()) for c in choices]}
    if task.metric == "acc_mutual_info":
        logprobs = logprobs - numpy.array([response[0] for response in responses[len(choices) :]])
    return str(choices[int(numpy.argmax(logprobs / numpy.array(lengths.get(task.metric, [1] * len(choices)))))])
