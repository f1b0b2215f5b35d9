"""Help that ends with examples that work, and commands that start without the heavy libraries."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli import app, bench, doctor, evaluate, generate, inspect, quantize, recipes, report, serve
from quantlab.eval.reports.files import write_reports
from tests.bench.openai_script import Script, serving
from tests.eval.reports.sample import sample_report

HEAVY = {"torch", "transformers", "datasets", "numpy", "safetensors", "pyarrow", "triton", "jinja2", "huggingface_hub"}
COMMANDS: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {
    (): app.EXAMPLES,
    ("quantize",): quantize.EXAMPLES,
    ("eval",): evaluate.EXAMPLES,
    ("generate",): generate.EXAMPLES,
    ("serve",): serve.EXAMPLES,
    ("inspect",): inspect.EXAMPLES,
    ("report",): report.EXAMPLES,
    ("doctor",): doctor.EXAMPLES,
    ("recipes",): recipes.EXAMPLES,
    ("recipes", "list"): recipes.LIST_EXAMPLES,
    ("recipes", "show"): recipes.SHOW_EXAMPLES,
    ("recipes", "validate"): recipes.VALIDATE_EXAMPLES,
    ("recipes", "schema"): recipes.SCHEMA_EXAMPLES,
    ("bench",): bench.EXAMPLES,
    ("bench", "serve"): bench.SERVE_EXAMPLES,
}
EVERY_EXAMPLE = sorted({command for examples in COMMANDS.values() for command, _ in examples})
SERVE_EXAMPLES = [example for example in EVERY_EXAMPLE if example.startswith("quantlab serve")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_with_the_examples(command: tuple[str, ...], flag: str, cli: Any) -> None:
    ran = cli(*command, flag)
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    assert "Usage: quantlab" in text
    last = text.index("Examples")
    for example, meaning in COMMANDS[command]:
        assert text.index(f"# {meaning} $ {example}") > last


@pytest.mark.parametrize("command", [*COMMANDS, ("bench", "offline"), ("bench", "kernels")], ids=" ".join)
def test_help_cuts_no_name_short_on_a_terminal_of_80_columns(
    command: tuple[str, ...], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = cli(*command, "--help").out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "int range" not in shown and "list[" not in shown


@pytest.mark.parametrize("example", SERVE_EXAMPLES)
def test_example_serves_until_it_is_told_to_end(example: str, tmp_path: Path, books_5m: Path) -> None:
    shutil.copytree(books_5m, tmp_path / "Llama-3.2-1B-w4a16")
    (tmp_path / "keys.txt").write_text("a-key-of-our-own\n")
    root = Path(__file__).parent.parent.parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    small = ["--port", "0", "--json", "--threads", "1", "--kv-memory", "16MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(example), *small],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["base_url"].startswith("http://")
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("example", [example for example in EVERY_EXAMPLE if example not in SERVE_EXAMPLES])
def test_example_works(example: str, cli: Any, here: Path, books_5m: Path) -> None:
    for name in ("Llama-3.2-1B", "Llama-3.2-1B-w4a16"):
        shutil.copytree(books_5m, here / name)
    (here / "notes.txt").write_text("Call me what you like. " * 40)
    for name in ("evaluation", "evaluation-before"):
        write_reports(sample_report(), here / name)
    (here / "gate.yaml").write_text("require:\n  - {metric: kl.mean, max: 0.5}\n")
    (here / "my.yaml").write_text("passes:\n  - pass: rtn\n")
    words = shlex.split(example.split(" > ")[0])
    assert words[0] == "quantlab"
    if words[1] == "quantize":
        # Everything but the work, which is tested elsewhere; the folder of the first example is there for `inspect`.
        shutil.rmtree(here / "Llama-3.2-1B-w4a16")
        words = [word for word in words if word != "--dry-run"] + ["--dry-run"]
    if words[1] == "generate":
        words += ["--max-tokens", "4"]
    if words[1] == "eval":
        words += ["--tokens", "128", "--window", "64", "--no-cache"]
    with serving(Script()) as script:
        if words[1] == "bench":
            words += ["--base-url", script.url, "--requests", "4", "--seconds", "1"]
        ran = cli(*words[1:])
    assert ran.code == 0, ran.err
    assert ran.out


def test_no_arguments_show_the_help(cli: Any) -> None:
    assert cli().out == cli("--help").out
    for group in ("recipes", "bench"):
        assert cli(group).out == cli(group, "--help").out


def test_version(cli: Any) -> None:
    ran = cli("--version")
    assert ran.code == 0
    assert ran.out.startswith("quantlab ")


def environment(repository: Path) -> dict[str, str]:
    """What a subprocess needs to find this tree."""
    return {**os.environ, "PYTHONPATH": f"{repository}:{repository / 'kernels'}", "TERM": "dumb"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["quantize", "--help"],
        ["eval", "--help"],
        ["generate", "--help"],
        ["generate", "MODEL"],
        ["generate", "MODEL", "--prompt", "text", "--device", "cuda"],
        ["generate", "nowhere", "--prompt", "text"],
        ["eval", "MODEL", "--baseline", "MODEL", "--text", "nowhere.txt"],
        ["eval", "MODEL", "--baseline", "MODEL", "--gate", "nothing"],
        ["recipes", "list"],
        ["recipes", "show", "w4a16-balanced"],
        ["recipes", "schema"],
        ["inspect", "MODEL"],
        ["inspect", "MODEL", "--json"],
        ["quantize", "MODEL", "--dry-run"],
        ["quantize", "MODEL", "--dry-run", "--json", "--quality", "best", "--scheme", "w8a8"],
        ["quantize", "MODEL", "--out", "MODEL"],
        ["quantise"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str], repository: Path, books_5m: Path) -> None:
    words = [str(books_5m) if word == "MODEL" else word for word in arguments]
    code = (
        "import sys\nfrom quantlab.cli.app import main\n"
        f"main({words!r})\n"
        f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(repository), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_completion_imports_nothing_heavy_and_offers_names(repository: Path) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', sorted({HEAVY!r} & set(sys.modules))))\n"
        "from quantlab.cli.app import main\nmain([])"
    )
    asked = {
        "_QUANTLAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "quantlab recipes show w8a16-",
        "COMP_CWORD": "3",
        "_TYPER_COMPLETE_ARGS": "quantlab recipes show w8a16-",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment(repository), **asked}, capture_output=True, text=True
    )
    lines = done.stdout.split()
    assert {"w8a16-balanced", "w8a16-rtn"} <= set(lines)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_module_runs_as_a_program_with_its_exit_code(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "inspect", "/nowhere"],
        env=environment(repository),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_a_path_that_is_not_text_can_be_shown(repository: Path, books_5m: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/m\xff"
    shutil.copytree(os.fsencode(books_5m), odd)
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "inspect", odd], env=environment(repository), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"28 linear modules" in done.stdout


def test_reader_that_leaves_early_is_no_error(repository: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m quantlab recipes schema | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment(repository), capture_output=True, text=True
    )
    assert done.stderr == ""
