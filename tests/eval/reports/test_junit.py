"""JUnit XML: counts that agree with the cases, and a colour that agrees with the exit code."""

from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from quantlab.errors import CheckpointError
from quantlab.eval.reports.files import JUNIT, write_error
from quantlab.eval.reports.junit import environment_error, junit
from quantlab.eval.result import Report
from tests.eval.reports.hostile import ATTACK, hostile_report
from tests.eval.reports.sample import LINES, gate

OUTCOMES = {"failures": "failure", "errors": "error", "skipped": "skipped"}
# What the schema of Jenkins' xUnit plugin allows (junit-10.xsd), as far as we write it.
ALLOWED = {
    "testsuites": {"name", "tests", "failures", "errors", "time"},
    "testsuite": {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
    "testcase": {"classname", "name", "time"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "skipped": {"message"},
    "properties": set(),
    "property": {"name", "value"},
    "system-out": set(),
}


def checked(content: bytes) -> Element:
    """The suite in `content`, whose counts agree with its cases and whose elements readers know."""
    root = fromstring(content)
    for each in root.iter():
        assert set(each.keys()) <= ALLOWED[each.tag], each.tag
    (suite,) = root.findall("testsuite")
    cases = suite.findall("testcase")
    assert suite.get("tests") == root.get("tests") == str(len(cases))
    for count, outcome in OUTCOMES.items():
        assert suite.get(count) == str(sum(case.find(outcome) is not None for case in cases))
    assert root.get("failures") == suite.get("failures") and root.get("errors") == suite.get("errors")
    return suite


def outcomes(suite: Element) -> list[str]:
    """What each case came to."""
    found = [[name for name in OUTCOMES.values() if case.find(name) is not None] for case in suite.iter("testcase")]
    return [names[0] if names else "passed" for names in found]


def test_a_missed_line_is_a_failure_with_its_reason(report: Report) -> None:
    suite = checked(junit(report))
    assert outcomes(suite) == ["failure", "passed", "failure"]
    case = suite.findall("testcase")[0]
    assert case.get("name") == "text.held-out books.ppl_ratio: at most 1.02"
    failure = case.find("failure")
    assert failure is not None and failure.get("type") == "threshold"
    assert failure.get("message") == LINES[0].reason and "measured: 1.0431" in (failure.text or "")


def test_an_undecided_line_fails_unless_the_gate_passes(undecided: Report, report: Report) -> None:
    suite = checked(junit(undecided))
    assert outcomes(suite) == ["passed", "failure"]
    assert suite.findall("testcase")[1].find("failure").get("type") == "inconclusive"  # type: ignore[union-attr]
    tolerant = report.model_copy(update={"gate": gate("pass", *LINES[1:])})
    assert outcomes(checked(junit(tolerant))) == ["passed", "skipped"]


def test_a_passed_gate_has_no_failure(passing: Report) -> None:
    assert outcomes(checked(junit(passing))) == ["passed"]


def test_without_a_gate_there_is_one_case_that_says_so(bare: Report) -> None:
    suite = checked(junit(bare))
    assert outcomes(suite) == ["passed"]
    assert "without a gate" in (suite.findall("testcase")[0].get("name") or "")


def test_provenance_is_in_the_properties(report: Report) -> None:
    properties = {each.get("name"): each.get("value") for each in checked(junit(report)).iter("property")}
    assert properties["candidate weights"] == report.candidate.weights
    assert properties["text wikitext-2 protocol"] == report.texts[1].protocol.digest


def test_what_kept_a_verdict_from_being_reached_is_an_error(tmp_path: Path) -> None:
    failure = CheckpointError("tensor \x1b[2J\x00 is <damaged>", where="model.safetensors", fix="download it again")
    assert write_error(failure, tmp_path / "out") == tmp_path / "out" / JUNIT
    suite = checked((tmp_path / "out" / JUNIT).read_bytes())
    assert outcomes(suite) == ["error"]
    error = suite.find("testcase/error")
    assert error is not None and error.get("type") == "QL0401"
    assert error.get("message") == r"tensor \x1b[2J\x00 is <damaged>"
    assert "download it again" in (error.text or "")
    assert (tmp_path / "out" / JUNIT).read_bytes() == environment_error(failure)


def test_hostile_text_makes_no_element_and_no_illegal_character() -> None:
    content = junit(hostile_report())
    suite = checked(content)
    assert outcomes(suite) == ["failure", "failure"]
    assert b"<script" not in content and b"\x1b" not in content and b"\x00" not in content
    told = suite.find("testcase/failure")
    assert told is not None and (told.get("message") or "").startswith(ATTACK[:20])


@pytest.mark.parametrize("which", ["report", "passing", "undecided"])
def test_red_exactly_when_the_exit_code_is_not_0(which: str, request: pytest.FixtureRequest) -> None:
    result: Report = request.getfixturevalue(which)
    assert result.gate is not None
    red = bool({"failure", "error"} & set(outcomes(checked(junit(result)))))
    assert red == (result.gate.verdict != "pass")


def test_the_time_has_no_zone(report: Report) -> None:
    for created in ("2026-11-22T10:00:00Z", "2026-11-22T10:00:00+00:00"):
        root = fromstring(junit(report.model_copy(update={"created": created})))
        assert next(root.iter("testsuite")).get("timestamp") == "2026-11-22T10:00:00"


def test_an_optional_line_that_was_not_measured_is_skipped(passing: Report) -> None:
    assert passing.gate is not None
    partial = passing.gate.model_copy(update={"left_out": ("task.*",)})
    suite = checked(junit(passing.model_copy(update={"gate": partial})))
    assert outcomes(suite) == [*["passed"] * len(passing.gate.lines), "skipped"]
