"""The shell script and the workflow that show how a CI uses the gate: they run, and say what the gate said."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

QUICK = "--scheme w8a8 --quality fast --samples 4 --seq-len 128 --device cpu"
FEW = ("--tokens", "2048", "--window", "128", "--device", "cpu", "--no-cache")


def gate_sh(
    repository: Path, *words: object, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The script as CI calls it, the command being this tree's."""
    environment = {key: value for key, value in os.environ.items() if key != "GITHUB_STEP_SUMMARY"}
    environment |= {"QUANTLAB": f"{sys.executable} -m quantlab", "QUANTIZE": QUICK, "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": f"{repository}:{repository / 'kernels'}", **(settings or {})}
    line = [str(repository / "examples" / "ci" / "gate.sh"), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600)


def gate_file(folder: Path, ratio: float) -> Path:
    path = folder / "gate.yaml"
    path.write_text(f"alpha: 0.05\nrequire:\n  - {{metric: ppl_ratio, max: {ratio}}}\n")
    return path


@pytest.fixture(scope="module")
def passed(repository: Path, books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """One run that passes."""
    folder = tmp_path_factory.mktemp("ci")
    settings = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    (folder / "summary.md").write_text("an earlier step\n")
    return folder, gate_sh(
        repository, books_5m, folder / "out", *FEW, "--gate", gate_file(folder, 1.5), settings=settings
    )


@pytest.mark.slow
def test_a_sound_model_passes_and_the_summary_is_published(passed):
    folder, done = passed
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("gate: pass")
    summary = (folder / "summary.md").read_text()
    assert summary.startswith("an earlier step\n")
    assert summary.removeprefix("an earlier step\n") == (folder / "out" / "report" / "summary.md").read_text()


@pytest.mark.slow
def test_the_model_and_every_report_are_kept(passed):
    folder, _ = passed
    assert (folder / "out" / "model" / "model.safetensors").exists()
    reports = {path.name for path in (folder / "out" / "report").iterdir()}
    assert reports >= {"report.json", "report.html", "junit.xml", "summary.md"}


def already_quantized(folder: Path, model: Path) -> dict[str, str]:
    """Settings with a command that copies a model where it should quantize, and for the rest is the real one."""
    command = folder / "quantlab"
    real = f'exec {sys.executable} -m quantlab "$@"'
    command.write_text(f'#!/bin/sh\n[ "$1" = quantize ] || {real}\ncp -r {model} "$4"\n')
    command.chmod(0o755)
    return {"QUANTLAB": str(command)}


@pytest.mark.slow
def test_a_model_that_misses_the_gate_fails_with_its_own_code(repository, books_5m, passed, tmp_path):
    settings = already_quantized(tmp_path, passed[0] / "out" / "model")
    words = (books_5m, tmp_path / "out", *FEW, "--gate", gate_file(tmp_path, 0.5))
    done = gate_sh(repository, *words, settings=settings)
    assert done.returncode == 10, done.stderr
    assert done.stdout.rstrip().endswith("gate: fail")
    assert (tmp_path / "out" / "report" / "summary.md").read_text() in done.stdout
    suites = ElementTree.parse(tmp_path / "out" / "report" / "junit.xml").getroot()
    assert suites.findall(".//failure")
    assert not suites.findall(".//error")


@pytest.mark.parametrize(("setting", "code"), [("fail", 11), ("pass", 0)])
def test_too_little_data_counts_as_the_user_says(repository, tmp_path, setting, code):
    command = tmp_path / "quantlab"
    command.write_text("#!/bin/sh\n[ $1 = quantize ] || exit 11\n")
    command.chmod(0o755)
    done = gate_sh(repository, "model", tmp_path / "out", settings={"INCONCLUSIVE": setting, "QUANTLAB": str(command)})
    assert done.returncode == code
    assert done.stdout.rstrip().endswith(f"gate: inconclusive, counted as {setting}")


def test_an_error_is_no_verdict_and_an_old_report_is_not_published_for_it(repository, books_5m, tmp_path):
    old = tmp_path / "out" / "report"
    old.mkdir(parents=True)
    (old / "summary.md").write_text("of yesterday")
    settings = already_quantized(tmp_path, books_5m)
    done = gate_sh(repository, books_5m, tmp_path / "out", *FEW, "--gate", tmp_path / "absent.yaml", settings=settings)
    assert done.returncode == 2
    assert "of yesterday" not in done.stdout
    assert done.stdout.rstrip().endswith("gate: no verdict, the evaluation ended with exit code 2")
    missing = gate_sh(repository, tmp_path / "absent", tmp_path / "out", *FEW)
    assert missing.returncode == 4
    assert missing.stderr.count("\n") == 1
    suite = ElementTree.parse(tmp_path / "out" / "report" / "junit.xml").getroot()[0]
    assert (suite.get("errors"), suite[0][0].get("type")) == ("1", "exit code 4")


def test_the_usage_is_shown_and_wrong_settings_are_refused(repository, tmp_path):
    done = gate_sh(repository)
    assert done.returncode == 2
    assert "usage: gate.sh MODEL OUT" in done.stderr
    assert "#" not in done.stderr
    done = gate_sh(repository, "a", tmp_path, settings={"INCONCLUSIVE": "maybe"})
    assert (done.returncode, done.stderr) == (2, "INCONCLUSIVE is pass or fail, not 'maybe'\n")


def test_the_workflow_runs_the_script_with_the_least_rights(repository):
    text = (repository / "examples" / "ci" / "quantize-and-gate.yml").read_text()
    workflow = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    assert any(re.search(r"examples/ci/gate\.sh ", script) for script in scripts)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    assert "pull_request_target" not in text
    assert not [script for script in scripts if "${{" in script]  # nothing a pull request may name reaches a shell
    assert (repository / job["env"]["MODEL"] / "config.json").exists()
