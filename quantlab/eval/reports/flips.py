"""The items whose answers changed between right and wrong, to be read one by one without a script.

Prompts and answers come from anywhere: they are cut, and shown as text with control characters visible. Knows nothing
about the page around it.
"""

from quantlab.eval.reports.elements import Markup, element
from quantlab.eval.reports.panels import folded
from quantlab.eval.reports.words import one_line, visible
from quantlab.eval.result import Flip, TaskResult

MAX_TASKS = 100
MAX_FLIPS = 25  # of a task
MAX_BYTES = 500_000  # of all flips, on a page that must stay under 2 MB
PROMPT, ANSWER = 1500, 400


def flips_browser(tasks: tuple[TaskResult, ...]) -> Markup | None:
    """One fold for each task that has flips; None when no task has."""
    told = [task for task in tasks if task.flips][:MAX_TASKS]
    if not told:
        return None
    most = MAX_BYTES // len(told)
    return element("div", {"class": "flips"}, *(_task(task, most) for task in told))


def _task(task: TaskResult, budget: int) -> Markup:
    shown, left = [], budget
    for flip in task.flips[:MAX_FLIPS]:
        item = _item(flip)
        left -= len(item.encode())
        if left < 0:
            break
        shown.append(item)
    counts = f"{task.right_to_wrong:,} right to wrong, {task.wrong_to_right:,} wrong to right"
    title = f"{one_line(task.name, 60)}: {counts}; {len(shown):,} shown"
    return folded(title, element("ol", None, *shown))


def _item(flip: Flip) -> Markup:
    kind, change = ("lost", "right to wrong") if flip.was_right else ("won", "wrong to right")
    head = element(
        "p",
        None,
        element("span", {"class": f"badge {kind}"}, change),
        f" item {flip.index:,}",
    )
    prompt = element("pre", {"class": "prompt"}, visible(flip.prompt, PROMPT))
    answers = element(
        "dl",
        None,
        element("dt", None, "baseline"),
        element("dd", None, visible(flip.baseline, ANSWER)),
        element("dt", None, "candidate"),
        element("dd", None, visible(flip.candidate, ANSWER)),
    )
    return element("li", None, head, prompt, answers)
