"""The documents say what is true: links lead somewhere, named options, recipes, targets and codes exist."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from quantlab.errors import QuantlabError
from quantlab.recipe_file import builtin_names

LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(#[^)]*)?\)")
PAGES = ("README.md", "CHANGELOG.md", "docs", "kernels", "examples")


def pages(repository: Path) -> list[Path]:
    """Every Markdown page that is shipped."""
    found = []
    for name in PAGES:
        place = repository / name
        found += [place] if place.is_file() else sorted(place.rglob("*.md"))
    return found


def options(repository: Path) -> set[str]:
    """Every option that the command line declares."""
    sources = (path.read_text() for path in (repository / "quantlab" / "cli").glob("*.py"))
    text = "\n".join(sources)
    declared = set(re.findall(r"--[a-z][a-z-]+", text))
    parameters = re.findall(r"^    ([a-z_]+): arg\.", text, flags=re.MULTILINE)
    return declared | {"--" + name.replace("_", "-") for name in parameters}


def test_links_lead_to_files(repository: Path) -> None:
    broken = [
        f"{page.relative_to(repository)}: {target}"
        for page in pages(repository)
        for target, _ in LINK.findall(page.read_text())
        if not target.startswith("http") and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_the_readme_names_only_options_that_exist(repository: Path) -> None:
    # Other commands' options stand in the same text.
    others = {"--local-dir"}
    named = set(re.findall(r"--[a-z][a-z-]+", (repository / "README.md").read_text()))
    assert named - others
    assert named - others <= options(repository)


def test_the_documents_name_only_recipes_that_exist(repository: Path) -> None:
    text = "\n".join(page.read_text() for page in pages(repository))
    named = set(re.findall(r"\b(?:w4a16|w8a8|w8a16)-[a-z][a-z-]*[a-z]\b", text))
    assert "w4a16-balanced" in named
    assert named <= set(builtin_names())


def test_every_make_target_in_the_documents_exists(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    text = "\n".join(page.read_text() for page in pages(repository))
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", text, flags=re.MULTILINE))
    assert {"demo", "test", "check", "bench-quality"} <= named
    assert named <= targets


def test_continuous_integration_runs_the_suite(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert "make test" in script.read_text()


@pytest.mark.parametrize("error", [QuantlabError, *QuantlabError.__subclasses__()])
def test_every_error_is_in_the_table_of_exit_codes(error: type[QuantlabError], repository: Path) -> None:
    row = rf"\| {error.exit_code} \| {error.code} \|"
    assert re.search(row, (repository / "docs" / "exit_codes.md").read_text())


def test_constraints_pin_every_dependency_within_its_range(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = Version(version)
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in project["dependencies"] + extras["serve"] + extras["test"]]
    for requirement in wanted:
        name = requirement.name.lower().replace("_", "-")
        if name not in ("triton", "quantlab"):  # torch pins its own triton; quantlab[serve] is looked at itself
            assert pins[name] in requirement.specifier, name


def test_the_shipped_model_is_complete(books_5m: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (books_5m / name).stat().st_size > 100, name


def test_the_shipped_texts_do_not_overlap(calibration_text: Path, evaluation_text: Path) -> None:
    calibration = calibration_text.read_text()
    held_out = [line for line in evaluation_text.read_text().split("\n") if len(line) > 80]
    assert len(held_out) > 500
    assert not [line for line in held_out if line in calibration]
