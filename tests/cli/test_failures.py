"""Whatever goes wrong becomes one line and a documented code."""

import errno
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from quantlab import errors
from quantlab.cli import doctor, failures
from quantlab.errors import QuantlabError, did_you_mean, nearest, printable
from quantlab.log import configure, logger


def every_error(kind: type[QuantlabError] = QuantlabError) -> set[type[QuantlabError]]:
    """All error classes of the package."""
    found = {kind}
    for child in kind.__subclasses__():
        found |= every_error(child)
    return {child for child in found if child.__module__ in (errors.__name__, failures.__name__)}


def test_every_code_is_documented_with_its_exit_code(repository: Path) -> None:
    text = (repository / "docs" / "exit_codes.md").read_text()
    table = set(re.findall(r"^\| (\d+) \| (QL\d{4}) \|", text, re.MULTILINE))
    assert table == {(str(kind.exit_code), kind.code) for kind in every_error()}


@pytest.mark.parametrize(
    ("error", "code", "fragment"),
    [
        (KeyError("layer"), 1, "unexpected KeyError: 'layer'"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two;"),
        (RuntimeError(), 1, "unexpected RuntimeError"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 7, "/out/x: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 7, "/out: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), 1, "unexpected OSError"),
        (errors.SolveError("loss is not finite", where="layer 3"), 12, "QL1201 layer 3: loss is not finite"),
    ],
)
def test_any_failure_is_one_line_with_its_code(
    error: BaseException, code: int, fragment: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[Any]:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    ran = cli("doctor")
    assert ran.code == code
    assert len(ran.lines) == 1
    assert fragment in ran.lines[0]


@pytest.mark.parametrize("place", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback_before_the_line(place: list[str], cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Any]:
        raise KeyError("layer")

    monkeypatch.setattr(doctor, "examine", fail)
    ran = cli(*place)
    assert ran.code == 1
    assert "Traceback (most recent call last)" in ran.err
    assert ran.lines[-1].startswith("error: QL0001")


def test_control_characters_in_an_argument_are_escaped(cli: Any) -> None:
    ran = cli("inspect", "no\x1b[2Jsuch\nfolder")
    assert ran.code == 4
    assert len(ran.lines) == 1
    assert "\x1b" not in ran.err


def test_nearest_needs_some_likeness() -> None:
    assert nearest("gptqq", ["gptq", "awq"]) == "gptq"
    assert nearest("zzz", ["gptq", "awq"]) is None
    assert did_you_mean("zzz", ["gptq", "awq"]) == " (known: gptq, awq)"


def test_printable_keeps_letters_of_every_language() -> None:
    assert printable("größe 重み\t") == "größe 重み\\t"


def test_log_lines_are_quiet_unless_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(debug: bool) -> str:
        capsys.readouterr()
        configure(debug)
        logger("quantlab.test").info("detail")
        return capsys.readouterr().err

    monkeypatch.delenv("QUANTLAB_LOG", raising=False)
    try:
        assert lines(debug=False) == ""
        assert "INFO quantlab.test: detail" in lines(debug=True)
        monkeypatch.setenv("QUANTLAB_LOG", "info")
        assert "detail" in lines(debug=False)
    finally:
        logging.captureWarnings(False)
        for name in ("quantlab", "py.warnings"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
