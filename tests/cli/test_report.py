"""`quantlab report`: a result file shown and rendered again, and what is no result refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlab.eval.reports.files import JUNIT, PAGE, RESULT, SUMMARY, write_reports
from quantlab.eval.result import Report
from tests.eval.reports.sample import sample_report


@pytest.fixture
def folder(here: Path) -> Path:
    """A folder that an evaluation has written."""
    write_reports(sample_report(), here / "evaluation")
    return here / "evaluation"


def test_a_result_is_shown_and_a_failed_gate_is_no_failure_of_the_command(cli: Any, folder: Path) -> None:
    ran = cli("report", folder)
    assert (ran.code, ran.err) == (0, "")
    assert "FAIL" in ran.out and "28.167" in ran.out
    assert cli("report", folder / RESULT).out == ran.out


def test_the_files_are_written_anew_byte_for_byte(cli: Any, folder: Path, here: Path) -> None:
    ran = cli("report", folder, "--out", here / "pages")
    assert ran.code == 0
    for name in (RESULT, JUNIT, SUMMARY, PAGE):
        assert f"written  {here / 'pages' / name}" in ran.out
        assert (here / "pages" / name).read_bytes() == (folder / name).read_bytes()


def test_json_is_the_checked_result(cli: Any, folder: Path) -> None:
    told = json.loads(cli("report", folder, "--json").out)
    assert Report.model_validate(told) == sample_report()


def test_another_gate_judges_the_same_measurements(cli: Any, folder: Path, here: Path) -> None:
    rules = {"ok": "{metric: kl.mean, max: 0.5}", "no": "{metric: kl.mean, max: 0.01}"}
    for name, rule in rules.items():
        (here / f"{name}.yaml").write_text(f"require:\n  - {rule}\n")
    assert cli("report", folder, "--gate", "ok.yaml").code == 0
    ran = cli("report", folder, "--gate", "no.yaml", "--out", here / "judged")
    assert ran.code == 10 and "FAIL  2 of 2 requirements are missed" in ran.out
    assert '<failure type="threshold"' in (here / "judged" / JUNIT).read_text()
    assert "no.yaml" in (here / "judged" / SUMMARY).read_text()


def test_a_gate_on_what_was_not_measured_is_one_line(cli: Any, folder: Path, here: Path) -> None:
    (here / "gate.yaml").write_text("require:\n  - {metric: task.hellaswag, max: 0.5}\n")
    ran = cli("report", folder, "--gate", "gate.yaml", "--out", here / "judged")
    assert ran.code == 2 and len(ran.lines) == 1 and "task.hellaswag" in ran.err
    assert not (here / "judged").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"schema_version": 9}', "\x00"])
def test_what_is_no_result_is_one_line(content: str, cli: Any, here: Path) -> None:
    (here / RESULT).write_text(content)
    ran = cli("report", here)
    assert ran.code == 4 and ran.out == ""
    assert len(ran.lines) == 1 and "QL0402" in ran.err and "quantlab eval" in ran.err


CONTRADICTIONS = {
    "more flips than items": ({"right_to_wrong": 300, "wrong_to_right": 101}, "more answers changed than there are"),
    "more answers than items": ({"answers_changed": 401}, "more answers changed than there are"),
    "flips that were not counted": ({"right_to_wrong": 0, "wrong_to_right": 15}, "more flips are listed than were"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_counts_that_contradict_each_other_are_one_line(kind: str, cli: Any, folder: Path) -> None:
    counts, told = CONTRADICTIONS[kind]
    result = json.loads((folder / RESULT).read_text())
    result["tasks"][0].update(counts)
    (folder / RESULT).write_text(json.dumps(result))
    assert_refused_result(cli("report", folder), f"tasks.0: {told}")


def test_noise_of_more_flips_than_items_is_one_line(cli: Any, folder: Path) -> None:
    result = json.loads((folder / RESULT).read_text())
    result["noise"]["tasks"][0]["flips"] = 401
    (folder / RESULT).write_text(json.dumps(result))
    assert_refused_result(cli("report", folder), "noise.tasks.0: more flips than items")


def assert_refused_result(ran: Any, told: str) -> None:
    assert ran.code == 4 and ran.out == ""
    assert len(ran.lines) == 1 and "QL0402" in ran.err and told in ran.err


def test_an_absent_file_is_one_line(cli: Any, here: Path) -> None:
    for place in (here, here / "absent.json"):
        ran = cli("report", place)
        assert ran.code == 4 and len(ran.lines) == 1 and "QL0402" in ran.err


def test_a_result_is_rendered_without_the_heavy_libraries(folder: Path, repository: Path) -> None:
    code = (
        "import sys\nfrom quantlab.cli.app import main\n"
        f"code = main(['report', {str(folder)!r}, '--out', 'pages'])\n"
        "print(code, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    paths = {"PYTHONPATH": f"{repository}:{repository / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **paths}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_an_earlier_result_is_shown_beside(cli: Any, folder: Path, here: Path) -> None:
    ran = cli("report", folder, "--against", folder)
    assert ran.code == 0
    assert "before" in ran.out and "+0.000" in ran.out
    other = json.loads((folder / RESULT).read_text())
    other["texts"][0]["protocol"]["dtype"] = "float64"
    (here / "other.json").write_text(json.dumps(other))
    refused = cli("report", folder, "--against", "other.json", "--out", here / "pages")
    assert refused.code == 2 and len(refused.lines) == 1 and "never compared; different: the dtype" in refused.err
    assert not (here / "pages").exists()


def test_json_of_two_results_holds_the_comparison(cli: Any, folder: Path, here: Path) -> None:
    earlier = json.loads((folder / RESULT).read_text())
    now = earlier["texts"][0]["perplexity"]["value"]
    earlier["texts"][0]["perplexity"]["value"] = now + 1
    (here / "earlier.json").write_text(json.dumps(earlier))
    ran = cli("report", folder, "--against", "earlier.json", "--json")
    told = json.loads(ran.out)
    assert ran.code == 0 and set(told) == {"report", "changes"}
    assert Report.model_validate(told["report"]) == sample_report()
    first, *others = told["changes"]
    assert (first["where"], first["before"], first["after"]) == (earlier["texts"][0]["name"], now + 1, now)
    assert others and all(change["before"] == change["after"] for change in others)
