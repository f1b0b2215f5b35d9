"""The README's first command does what the README says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def printed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo prints, run as make runs it but at the quickest setting."""
    out = tmp_path_factory.mktemp("demo")
    line = [sys.executable, "examples/demo.py", "--quality", "fast", "--tokens", "4096", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{repository}:{repository / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(printed: str, name: str) -> list[str]:
    """The cells of one row of the table."""
    line = next(line for line in printed.split("\n") if name in line and "│" in line)
    return [cell.strip() for cell in line.split("│")[1:-1]]


def test_it_prints_one_table_with_the_three_models(printed: str) -> None:
    assert printed.count("┏") == 1
    for name in ("16-bit", "INT4", "INT8"):
        assert row(printed, name)[0] == name


def test_sizes_and_bits_fall_and_ratios_stay_near_one(printed: str) -> None:
    sixteen, four, eight = (row(printed, name) for name in ("16-bit", "INT4", "INT8"))
    sizes = [float(cells[1].split()[0]) for cells in (sixteen, eight, four)]
    assert sizes == sorted(sizes, reverse=True)
    assert float(four[2]) == pytest.approx(4.125, abs=0.01)
    assert 8.0 < float(eight[2]) < 8.2
    assert sixteen[4] == "1.0000"
    assert 1.0 < float(four[4]) < 1.2
    assert 0.99 < float(eight[4]) < 1.01
    assert float(eight[5]) < float(four[5])


def test_it_shows_the_commands_that_it_runs(printed: str) -> None:
    assert printed.count("$ quantlab quantize") == 2
