"""Two results side by side: the same figures of both, and nothing where they were not measured alike."""

from typing import Any

import pytest

from quantlab.errors import UsageError
from quantlab.eval.comparison import check_comparable, compare_reports
from quantlab.eval.result import Report
from tests.eval.reports.sample import sample_report


@pytest.fixture
def report() -> Report:
    return sample_report()


def with_protocol(report: Report, **changes: Any) -> Report:
    """The same result, its first text scored in another way."""
    first = report.texts[0]
    other = first.model_copy(update={"protocol": first.protocol.model_copy(update={**changes, "digest": "f" * 64})})
    return report.model_copy(update={"texts": (other, *report.texts[1:])})


def test_every_text_and_task_of_both_is_compared(report: Report) -> None:
    better = report.texts[0].model_copy(
        update={"perplexity": report.texts[0].perplexity.model_copy(update={"value": 20.0})}
    )
    changes = compare_reports(report, report.model_copy(update={"texts": (better, *report.texts[1:])}))
    assert {change.where for change in changes} == {
        *(text.name for text in report.texts),
        *(task.name for task in report.tasks),
    }
    perplexity = next(change for change in changes if change.figure.startswith("perplexity"))
    assert (perplexity.before, perplexity.after) == (report.texts[0].perplexity.value, 20.0)
    assert all(change.before == change.after for change in changes if change is not perplexity)


def test_what_only_one_result_has_is_left_out(report: Report) -> None:
    fewer = report.model_copy(update={"tasks": (), "texts": report.texts[:1]})
    assert {change.where for change in compare_reports(report, fewer)} == {report.texts[0].name}
    with pytest.raises(UsageError, match="no text and no task in common"):
        compare_reports(report, report.model_copy(update={"tasks": (), "texts": ()}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "float64"}, "different: the dtype$"),
        ({"window": 77, "name": "gptq-77"}, "different: the protocol, the window$"),
        ({"text": "e" * 64}, "different: the text$"),
        ({}, "different: the digest$"),
    ],
)
def test_two_protocols_are_refused_by_what_differs(changes: dict[str, Any], told: str, report: Report) -> None:
    other = with_protocol(report, **changes)
    with pytest.raises(UsageError, match=told):
        compare_reports(report, other)
    check_comparable(report.texts[0].protocol, report.texts[0].protocol, "a")


def test_two_baselines_are_refused(report: Report) -> None:
    other = report.model_copy(update={"baseline": report.baseline.model_copy(update={"weights": "e" * 64})})
    with pytest.raises(UsageError, match="measured against two baselines"):
        compare_reports(report, other)


def test_other_items_of_a_task_are_refused(report: Report) -> None:
    other = report.tasks[0].model_copy(update={"data": "e" * 64})
    with pytest.raises(UsageError, match="was asked on different items"):
        compare_reports(report, report.model_copy(update={"tasks": (other, *report.tasks[1:])}))
