"""A few seconds of more than the server can take; `make bench-soak` takes ten minutes of it."""

from array import array
from dataclasses import replace
from pathlib import Path

from quantlab.bench.serve_client import Outcome
from quantlab.bench.serve_load import Loaded
from quantlab.bench.serve_options import Level, Limits
from quantlab.bench.serve_summary import summarize
from quantlab.bench.soak import Soaked, soak, table


def test_more_than_the_server_can_take_loses_nothing(books_5m: Path, tmp_path: Path) -> None:
    found = soak(books_5m, 4.0, 2.0, tmp_path, ["--threads", "1", "--kv-memory", "16MB"])
    held = {verdict.what: verdict.holds for verdict in found.verdicts()}
    assert found.lost == {}
    assert found.level.succeeded > 5 and found.level.succeeded + found.refused == found.level.sent
    # A few seconds say nothing about memory, and a busy machine nothing about times.
    assert [held[what] for what in held if not what.startswith(("memory", "first tokens"))] == [True] * 3


def soaked(**changes: object) -> Soaked:
    good = Outcome(0.0, 0.0, 0.5, 1.0, array("d"), 1, 10, 0, 1, True)
    outcomes = [good, replace(good, failure="HTTP 429: the queue is full")]
    sound = Soaked(10.0, summarize(Level(rate=2.0), Loaded(outcomes, 0.0, 1.0), Limits()), (1e9, 1.01e9), 0.0, True)
    return replace(sound, **changes)  # type: ignore[arg-type]


def test_each_verdict_can_be_missed() -> None:
    assert all(verdict.holds for verdict in soaked().verdicts())
    lost = Loaded([Outcome(0.0, 0.0, failure="connection lost")], 0.0, 1.0)
    late = Loaded([Outcome(0.0, 0.0, 90.0, 91.0, array("d"), 1, 10, 0, 1, True)], 0.0, 100.0)
    for place, changes in enumerate(
        (
            {"level": summarize(Level(rate=2.0), lost, Limits())},
            {"resident": (1e9, 1.03e9)},
            {"level": summarize(Level(rate=2.0), late, Limits())},
            {"blocks_used": 0.01},
            {"still_answers": False},
        )
    ):
        missed = [verdict.holds for verdict in soaked(**changes).verdicts()]
        assert missed == [index != place for index in range(5)]
    assert table(soaked()).row_count == 5
