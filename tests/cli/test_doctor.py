"""The doctor's findings: what is there, what its absence costs, and what fixes it."""

import json
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantlab.cli import doctor, machine
from quantlab.cli.machine import Finding


def absent(name: str) -> str:
    """A lookup on a machine without packages."""
    raise PackageNotFoundError(name)


def test_this_machine_can_quantize(cli: Any) -> None:
    ran = cli("doctor")
    assert (ran.code, ran.err) == (0, "")
    for name in ("python", "torch", "transformers", "gpu", "cpu", "memory", "disk", "extra serve", "serves w4a16 g128"):
        assert name in ran.out


def test_json_names_every_finding_with_its_fix(cli: Any) -> None:
    found = json.loads(cli("doctor", "--json").out)
    assert found["quantlab"]
    assert all(set(finding) == {"name", "status", "found", "cost", "fix"} for finding in found["findings"])
    assert all(finding["cost"] for finding in found["findings"] if finding["status"] == "missing")


def test_ranges_are_those_of_the_package(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    stated = {line.split(";")[0].strip() for line in project["dependencies"]}
    for name in ("torch", "transformers", "triton"):
        low, high = machine.REQUIRED[name]
        assert f"{name}>={low},<{high}" in stated
    for name in machine.REQUIRED:
        assert any(line.startswith(f"{name}>={machine.REQUIRED[name][0]}") for line in stated)


@pytest.mark.parametrize("name", machine.REQUIRED)
def test_a_missing_package_has_a_cost_and_a_fix(name: str) -> None:
    finding = machine.package(name, absent)
    assert finding.status == ("note" if name in machine.OPTIONAL else "missing")
    assert finding.cost
    assert finding.fix is not None and finding.fix.startswith("pip install")


def test_a_version_outside_the_tested_range_is_noted() -> None:
    assert machine.package("torch", lambda name: "2.13.0+cpu").status == "ok"
    assert machine.package("torch", lambda name: "2.14.0").status == "note"
    assert machine.package("torch", lambda name: "2.9.1").status == "note"


def test_a_missing_extra_names_its_package() -> None:
    finding = machine.extra("compressed-tensors", "0.17.1", "no check", absent)
    assert (finding.status, finding.fix) == ("note", "pip install 'compressed-tensors>=0.17.1'")


@pytest.mark.parametrize("name", machine.GROUPS)
def test_an_extra_that_is_not_whole_names_what_it_lacks(name: str, repository: Path) -> None:
    def without_the_last(package: str) -> str:
        return absent(package) if package == packages[-1] else "1"

    packages = machine.GROUPS[name][1]
    assert machine.group(name, lambda package: "1").status == "ok"
    finding = machine.group(name, without_the_last)
    assert (finding.status, finding.fix) == ("note", f"pip install 'quantlab[{name}]'")
    assert finding.found == f"without {packages[-1]}" and finding.cost
    stated = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"][name]
    assert all(any(line.startswith((f"{package}>", f"{package}=")) for line in stated) for package in packages)


def test_gpus_are_listed_with_memory() -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9, major=9, minor=0)
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda index: card)
    finding = machine.gpu(SimpleNamespace(cuda=cuda))
    assert finding.found == "NVIDIA H200, 150 GB, sm_90; NVIDIA H200, 150 GB, sm_90"


def test_cpu_without_bfloat16_is_noted(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags : fpu sse2 avx2\n")
    assert machine.cpu(info).status == "note"
    info.write_text("processor : 0\nflags : fpu avx512_bf16 amx_bf16\n")
    assert "amx_bf16" in machine.cpu(info).found


def test_little_memory_is_noted_and_unknown_memory_is_no_error(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:        8000000 kB\nMemAvailable:    1000000 kB\n")
    assert machine.ram(info).status == "note"
    assert machine.ram(tmp_path / "absent").found == "unknown on this system"


def test_a_missing_piece_exits_with_its_code_and_fix(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding("torch", "missing", "not installed", "nothing can be quantized", "pip install torch")
    monkeypatch.setattr(doctor, "examine", lambda: [broken])
    ran = cli("doctor")
    assert ran.code == 3
    assert ran.lines == ["error: QL0301 cannot quantize without torch; try: pip install torch"]
    assert "nothing can be quantized" in ran.out
