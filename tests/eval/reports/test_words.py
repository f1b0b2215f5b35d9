"""Numbers and verdicts in words, sums that agree with the gate, and what is done to text from outside."""

from collections.abc import Callable

import pytest

from quantlab.eval.gate import judge
from quantlab.eval.gate_file import parse_gate
from quantlab.eval.reports.tables import duration, pooled, provenance
from quantlab.eval.reports.words import one_line, perplexity, points, small, verdict_sentence, visible
from quantlab.eval.result import Report
from tests.eval.reports.sample import LINES, gate, task_result

GATE = "require:\n  - {metric: tasks.accuracy, test: noninferiority, margin_points: 2}\n"


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (small, 0.0481, "0.0481"),
        (small, 0.0000213, "0.0000213"),
        (small, 2.1e-9, "2.1e-09"),
        (small, 0.0, "0"),
        (small, -0.00002, "-0.00002"),
        (perplexity, 27.0041, "27.004"),
        (perplexity, 1605.92, "1,605.9"),
        (perplexity, 3.2e9, "3.2e+09"),
        (points, 0.015, "+1.5"),
        (points, -0.0002, "0.0"),
    ],
)
def test_numbers_are_short(show: Callable[[float], str], value: float, text: str) -> None:
    assert show(value) == text


def test_the_sentence_names_what_decides(report: Report, undecided: Report, passing: Report, bare: Report) -> None:
    assert verdict_sentence(report) == f"1 of 3 requirements is missed: {LINES[0].metric}, {LINES[0].reason}."
    assert verdict_sentence(undecided).startswith("Nothing is missed, but 1 of 2 requirements is undecided: task.piqa")
    assert verdict_sentence(passing) == "The only requirement is met."
    assert "No gate" in verdict_sentence(bare)
    many = report.model_copy(update={"gate": gate("fail", *[LINES[0]] * 5)})
    assert verdict_sentence(many).endswith(f"{LINES[0].metric}, {LINES[0].metric}, {LINES[0].metric} and 2 more.")
    assert verdict_sentence(report.model_copy(update={"gate": gate("pass", *[LINES[1]] * 4)})).startswith("All 4")


def test_what_a_screen_would_obey_is_made_visible() -> None:
    assert visible("a\x1b[2J\x00\tb\nc\u202ed\u200b", 100) == "a\\x1b[2J\\x00\\tb\nc\\u202ed\\u200b"
    assert one_line("a\nb") == "a\\nb"
    assert visible("naïve 漢字 🙂", 100) == "naïve 漢字 🙂"


def test_long_text_is_cut_with_a_count() -> None:
    assert visible("x" * 1500, 1000) == "x" * 1000 + " ... (500 more characters)"


def test_marks_piled_on_a_letter_are_thinned() -> None:
    assert visible("e" + "\u0301" * 40 + "x", 100) == "e" + "\u0301" * 3 + "x"


def test_the_tasks_together_are_what_the_gate_calls_so(report: Report) -> None:
    unequal = (task_result("a", "acc", 30, 10), task_result("b", "acc", 2, 2).model_copy(update={"items": 1200}))
    lines = judge(parse_gate(GATE, "gate.yaml", "gate.yaml"), (), unequal, None).lines
    before, change = pooled(unequal)
    assert change == pytest.approx(lines[0].measured) == pytest.approx(-20 / 1600)
    assert before == pytest.approx(0.6)


def test_stages_do_not_count_the_total_twice(report: Report) -> None:
    timed = report.model_copy(update={"seconds": {"text": 30.0, "tasks": 60.0, "total": 95.0}})
    assert duration(timed) == 95.0 and duration(report) == pytest.approx(215.7)
    (row,) = [row for row in provenance(timed).rows if row[0] == "time"]
    assert row[1] == "1m 35s (text 30s, tasks 1m 00s)"


def test_a_verdict_says_which_optional_lines_were_not_judged(passing: Report) -> None:
    assert passing.gate is not None and "Not measured" not in verdict_sentence(passing)
    partial = passing.gate.model_copy(update={"left_out": ("tasks.accuracy", "task.*")})
    told = verdict_sentence(passing.model_copy(update={"gate": partial}))
    assert told.endswith("met. Not measured and so not judged: tasks.accuracy, task.*.")
