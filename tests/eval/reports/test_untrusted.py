"""Any number that a result file may hold makes a report, or one error; never a traceback."""

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from quantlab.errors import QuantlabError
from quantlab.eval.gate import judge
from quantlab.eval.gate_file import default_gate
from quantlab.eval.reports.html import html
from quantlab.eval.reports.junit import junit
from quantlab.eval.reports.markdown import markdown
from quantlab.eval.reports.terminal import show
from quantlab.eval.result import Report
from tests.eval.reports.sample import sample_report

NUMBERS = (0, -1, 2**63 - 1, 5e-324, 1e100, -1e100)
Place = tuple[str | int, ...]


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """The places of numbers: in a list, those of the first and the last entry stand for all."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from places(below, (*above, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[index], (*above, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield above


def changed(value: Any, place: Place, number: float) -> Any:
    """A copy of `value` with another number at `place`."""
    if not place:
        return number
    first, *rest = place
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[first] = changed(value[first], tuple(rest), number)
    return copy


def lean(report: Report) -> dict[str, Any]:
    """The sample with little to draw, as JSON."""
    text = report.texts[0].model_copy(update={"positions": report.texts[0].positions[:3]})
    few = {"items": 40, "right_to_wrong": 4, "wrong_to_right": 2, "answers_changed": 9}  # exact tests are quick on few
    task = report.tasks[0].model_copy(update=few)
    assert report.gate is not None
    small = {
        "texts": (text,),
        "layers": report.layers[:2],
        "tasks": (task,),
        "gate": report.gate.model_copy(update={"lines": report.gate.lines[:1]}),
    }
    found: dict[str, Any] = json.loads(report.model_copy(update=small).model_dump_json())
    return found


def render(report: Report) -> None:
    """Everything that reads a result."""
    assert html(report) and junit(report) and markdown(report)
    show(report, Console(file=io.StringIO(), width=100))
    assert judge(default_gate(), report.texts, report.tasks, report.noise).lines


SOUND = lean(sample_report())
PLACES = sorted(places(SOUND), key=str)


def test_the_places_are_those_of_every_number() -> None:
    render(Report.model_validate(SOUND))
    names = {next(part for part in reversed(place) if isinstance(part, str)) for place in PLACES}
    assert {"value", "standard_error", "baseline_nll", "edges", "counts", "flips", "error", "p_value", "bytes"} <= names
    assert len(PLACES) > 80


@pytest.mark.parametrize("number", NUMBERS)
def test_any_number_makes_a_report_or_one_error(number: float) -> None:
    accepted = 0
    for place in PLACES:
        try:
            report = Report.model_validate(changed(SOUND, place, number))
        except ValidationError:
            continue
        accepted += 1
        try:
            render(report)
        except QuantlabError:
            continue
        except Exception as error:
            raise AssertionError(f"{number} at {place}") from error
    assert accepted > 40
