"""`quantlab eval`: options in, one call to `eval.run`, reports out, the verdict as the exit code.

Knows nothing about models or statistics; torch is imported only when all that can be checked without it has been.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantlab.cli import arguments as quantize_arg
from quantlab.cli import eval_arguments as arg
from quantlab.cli.console import data_console, print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.failures import Interrupted, known_failure
from quantlab.cli.preflight import check_device, check_folder
from quantlab.cli.progress import make_view
from quantlab.errors import OutputError, UsageError
from quantlab.eval.corpus import find_texts
from quantlab.eval.extra import require_harness
from quantlab.eval.gate_file import find_gate
from quantlab.eval.options import EvalOptions, ProtocolName, ServedOptions, TaskOptions, TextOptions
from quantlab.eval.result import Report
from quantlab.runtime.options import KVDtype

if TYPE_CHECKING:
    from quantlab.eval.harness_stage import HarnessStage

EXAMPLES = (
    ("quantlab eval ./Llama-3.2-1B-w4a16 --baseline ./Llama-3.2-1B", "a verdict from the bundled text"),
    ("quantlab eval ./Llama-3.2-1B-w4a16 -b ./Llama-3.2-1B --text notes.txt --out ./evaluation", "your text, a report"),
    ("quantlab eval ./Llama-3.2-1B-w4a16 -b ./Llama-3.2-1B --gate strict --json", "another gate, for a script"),
)
EXIT_CODES = {"pass": 0, "fail": 10, "inconclusive": 11}
app = typer.Typer()


@app.command("eval", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    candidate: arg.Candidate,
    baseline: arg.Baseline,
    text: arg.Text = None,
    protocol: arg.Protocol = "gptq",
    window: arg.Window = None,
    tokens: arg.Tokens = None,
    suite: arg.Suite = None,
    tasks: arg.Tasks = None,
    task_dir: arg.TaskDir = None,
    limit: arg.Limit = None,
    allow_task_code: arg.AllowCode = False,
    gate: arg.GateOption = "default",
    device: quantize_arg.Device = "auto",
    dtype: arg.Dtype = "auto",
    batch_size: arg.BatchSize = None,
    served: arg.Served = False,
    kv_dtype: arg.KVDtypeOption = "auto",
    int8_head: arg.Int8Head = False,
    cache: arg.Cache = None,
    no_cache: arg.NoCache = False,
    out: arg.Out = None,
    json: quantize_arg.Json = False,
) -> None:
    """Judge a quantized model against the model it stands for: what was lost, and whether a gate lets it through.

    Exits with 0 for pass, 10 for fail, 11 for inconclusive. The baseline's results are kept for the next candidate.
    """
    with told_in(out):
        if no_cache and cache is not None:
            raise UsageError("--no-cache and --cache exclude each other", where="--cache")
        protocols: tuple[ProtocolName, ...] = ("gptq", "rolling") if protocol == "both" else (protocol,)
        texts = TextOptions(find_texts(text or ()), protocols, window, tokens)
        kept = None if no_cache else cache or Path.home() / ".cache" / "quantlab" / "eval"
        ran = served_options(served, kv_dtype, int8_head)
        options = EvalOptions(candidate, baseline, texts, find_gate(gate), device, dtype, batch_size, kept, ran)
        asked = TaskOptions(task_names(suite, tasks), task_dir, limit, allow_task_code)
        check_tasks(asked)
        check_device(device)
        for folder in (kept, out):
            if folder is not None:
                check_folder(folder)
        report = run(options, asked)
        show(report, out, json)
    raise typer.Exit(EXIT_CODES[report.gate.verdict] if report.gate else 0)


@contextmanager
def told_in(out: Path | None) -> Iterator[None]:
    """Whatever ends the block early also goes to `out`, as CI reads it, and no older verdict stays there."""
    try:
        yield
    except BaseException as error:
        if out is not None:
            from quantlab.eval.reports.files import write_error

            with suppress(OutputError):  # what came first is what the user must hear of
                write_error(known_failure(error), out)
        raise


def served_options(served: bool, kv_dtype: KVDtype, int8_head: bool) -> ServedOptions | None:
    """How the candidate runs, None for plain torch; raises UsageError for the engine's options without it."""
    for option, given in (("--kv-dtype", kv_dtype != "auto"), ("--int8-head", int8_head)):
        if given and not served:
            raise UsageError("is the serving engine's", where=option, fix=f"--served {option}")
    return ServedOptions(kv_dtype, int8_head) if served else None


def task_names(suite: str | None, tasks: str | None) -> tuple[str, ...]:
    """What --suite and --tasks name together; raises UsageError for one that is given and names nothing."""
    names: list[str] = []
    for option, given in (("--suite", suite), ("--tasks", tasks)):
        found = [name.strip() for name in (given or "").split(",") if name.strip()]
        if given is not None and not found:
            raise UsageError("names nothing", where=option, fix="--suite core, or --tasks A,B")
        names += found
    return tuple(names)


def check_tasks(asked: TaskOptions) -> None:
    """Raises UsageError for options of tasks where none is named."""
    for option, given in (("--task-dir", asked.task_dir), ("--limit", asked.limit)):
        if given is not None and not asked.names:
            raise UsageError("no task is named for it", where=option, fix="--suite core, or --tasks A,B")


def run(options: EvalOptions, asked: TaskOptions) -> Report:
    """Carry the evaluation out, with progress on stderr."""
    from quantlab.eval.run import evaluate

    try:
        stage = load_stage(asked) if asked.names else None
        with make_view(sys.stderr) as view:
            return evaluate(options, stage, view)
    except KeyboardInterrupt:
        fix = "the same command again; what the cache holds of the baseline is not measured twice"
        raise Interrupted("stopped; no report was written", where=str(options.candidate), fix=fix) from None


def load_stage(asked: TaskOptions) -> "HarnessStage":
    """The tasks that were asked for, ready; raises MissingExtra without lm-eval."""
    require_harness()
    from quantlab.eval.harness_stage import load_stage as load

    return load(asked)


def show(report: Report, out: Path | None, json: bool) -> None:
    """Write the report's files, and the report itself to stdout."""
    from quantlab.eval.reports.files import write_reports
    from quantlab.eval.reports.terminal import show as show_tables

    written = write_reports(report, out) if out is not None else []
    if json:
        print_json(report.model_dump(mode="json"))
        return
    console = data_console()
    show_tables(report, console)
    for path in written:
        console.print(f"written  {path}", markup=False)
