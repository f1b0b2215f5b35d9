"""Reports of every verdict, and the least of all reports, from one result made by hand."""

import pytest

from quantlab.eval.result import Report
from tests.eval.reports.sample import LINES, gate, sample_report


@pytest.fixture
def report() -> Report:
    """A whole report that failed its gate."""
    return sample_report()


@pytest.fixture
def passing(report: Report) -> Report:
    """The same measurements under a gate that they pass."""
    return report.model_copy(update={"gate": gate("pass", LINES[1])})


@pytest.fixture
def undecided(report: Report) -> Report:
    """The same measurements, and a gate that cannot tell."""
    return report.model_copy(update={"gate": gate("inconclusive", *LINES[1:])})


@pytest.fixture
def bare(report: Report) -> Report:
    """The least that an evaluation finds: one text from one window, no tasks, noise, layers or gate."""
    text = report.texts[0]
    alone = {"standard_error": None, "clusters": 1}
    unknown = {key: getattr(text, key).model_copy(update=alone) for key in ("log_ratio", "agreement", "delta_p_rms")}
    text = text.model_copy(update={**unknown, "positions": ()})
    return report.model_copy(update={"texts": (text,), "tasks": (), "noise": None, "layers": (), "gate": None})
