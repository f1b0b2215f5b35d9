"""The published JSON Schema: in step with the code, valid itself, and true of what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from quantlab.eval.reports.schema import schema
from quantlab.eval.result import Report


@pytest.fixture(scope="module")
def published(repository: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((repository / "docs" / "report.schema.json").read_text())
    return loaded


def test_the_published_schema_is_the_code_s(repository: Path) -> None:
    """When it fails: quantlab report --schema > docs/report.schema.json, and a new SCHEMA_VERSION if files broke."""
    assert (repository / "docs" / "report.schema.json").read_text() == schema()


def test_the_schema_is_a_schema_of_its_draft(published: dict[str, Any]) -> None:
    assert published["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(published)
    assert set(published["properties"]) == set(Report.model_fields)


@pytest.mark.parametrize("which", ["report", "passing", "undecided", "bare"])
def test_written_reports_are_valid(which: str, published: dict[str, Any], request: pytest.FixtureRequest) -> None:
    report: Report = request.getfixturevalue(which)
    assert not list(Draft202012Validator(published).iter_errors(json.loads(report.model_dump_json())))


def test_the_schema_refuses_what_the_reader_refuses(report: Report, published: dict[str, Any]) -> None:
    sound = json.loads(report.model_dump_json())
    wrong: list[dict[str, Any]] = [
        {**sound, "extra": 1},
        {**sound, "schema_version": 2},
        {**sound, "machine": {**sound["machine"], "threads": -1}},
        {**sound, "baseline": {**sound["baseline"], "weights": "abc"}},
        {**sound, "gate": {**sound["gate"], "verdict": "maybe"}},
        {key: value for key, value in sound.items() if key != "texts"},
    ]
    for value in wrong:
        assert list(Draft202012Validator(published).iter_errors(value))
        with pytest.raises(ValueError):
            Report.model_validate(value)
