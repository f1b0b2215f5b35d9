"""The `quantlab` command: its sub-commands, and the one place where errors become a line and an exit code.

Knows nothing about quantization. Nothing here or in the commands' modules imports torch until a command needs it.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from quantlab import __version__
from quantlab.cli import bench, doctor, evaluate, generate, inspect, quantize, recipes, report, serve
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.failures import Interrupted, tell

EXAMPLES = (
    ("quantlab quantize ./Llama-3.2-1B --out ./Llama-3.2-1B-w4a16", "INT4 weights, ready for any engine"),
    ("quantlab quantize ./Llama-3.2-1B --dry-run", "what it would do, in a second"),
    ("quantlab eval ./Llama-3.2-1B-w4a16 --baseline ./Llama-3.2-1B", "what it cost, and whether that is acceptable"),
    ("quantlab generate ./Llama-3.2-1B-w4a16 --prompt 'It was a dark and'", "what it writes"),
    ("quantlab serve ./Llama-3.2-1B-w4a16", "an OpenAI-compatible server for it"),
    ("quantlab inspect ./Llama-3.2-1B-w4a16", "what is in a folder"),
    ("quantlab doctor", "what this machine can do"),
)


def build() -> typer.Typer:
    """The command tree."""
    app = typer.Typer(
        name="quantlab",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        epilog=epilog(EXAMPLES),
    )
    app.callback(invoke_without_command=True)(root)
    for command in (quantize.app, evaluate.app, generate.app, serve.app, inspect.app, report.app, doctor.app):
        app.add_typer(command)
    app.add_typer(recipes.app, name="recipes")
    app.add_typer(bench.app, name="bench")
    return app


def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works anywhere on the line.")] = False,
) -> None:
    """Quantize decoder-only language models to packed INT4 and INT8 that every engine loads."""
    if version:
        print(f"quantlab {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Writes data to stdout, messages and errors to stderr."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    debug = "--debug" in options
    arguments = [word for i, word in enumerate(argv) if word != "--debug" or i >= len(options)]
    try:
        code = typer.main.get_command(build()).main(arguments, prog_name="quantlab", standalone_mode=False)
        sys.stdout.flush()
        # typer turns Ctrl-C into this code without a word.
        return tell(Interrupted("interrupted"), debug) if code == Interrupted.exit_code else code or 0
    except BrokenPipeError:
        # The reader (head, less) has gone: not an error of ours, but the interpreter must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as err:
        return tell(err, debug)
