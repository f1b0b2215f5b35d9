"""The files of a report: all there, read back equal, and never believed blindly."""

from pathlib import Path

import pytest

from quantlab.errors import CheckpointError, OutputError, ReportError
from quantlab.eval.reports.files import JUNIT, PAGE, RESULT, SUMMARY, read_report, write_error, write_reports
from quantlab.eval.result import Report


def test_all_files_are_written_and_the_result_reads_back_equal(report: Report, tmp_path: Path) -> None:
    written = write_reports(report, tmp_path / "new" / "out")
    assert [path.name for path in written] == [JUNIT, SUMMARY, PAGE, RESULT]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted([JUNIT, SUMMARY, PAGE, RESULT])
    assert read_report(tmp_path / "new" / "out") == read_report(tmp_path / "new" / "out" / RESULT) == report


def test_older_files_are_replaced(report: Report, passing: Report, tmp_path: Path) -> None:
    write_reports(report, tmp_path)
    write_reports(passing, tmp_path)
    assert read_report(tmp_path) == passing
    assert (tmp_path / PAGE).read_text().count("FAIL") == 0


def test_an_output_that_cannot_be_written_is_one_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_reports(report, tmp_path / "file")
    (tmp_path / "out" / JUNIT).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write_reports(report, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JUNIT]


def test_an_error_leaves_no_older_verdict_beside_it(passing: Report, tmp_path: Path) -> None:
    write_reports(passing, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    write_error(CheckpointError("damaged"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JUNIT, "notes.txt"]


def test_a_report_that_could_not_be_finished_has_no_result_file(
    report: Report, passing: Report, tmp_path: Path
) -> None:
    write_reports(passing, tmp_path)
    (tmp_path / PAGE).unlink()
    (tmp_path / PAGE).mkdir()
    with pytest.raises(OutputError):
        write_reports(report, tmp_path)
    assert not (tmp_path / RESULT).exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no result"),
        (b"{", "no result"),
        (b"[]", "no result"),
        (b"\xff\xfe", "no result"),
        (b'{"schema_version": 2}', "schema_version"),
        (b"[" * 100_000, "no result"),
    ],
)
def test_a_file_that_is_no_result_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / RESULT).write_bytes(content)
    with pytest.raises(ReportError, match=told):
        read_report(tmp_path)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(ReportError):
            read_report(path)
