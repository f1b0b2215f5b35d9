"""A plan, and a finished run, as tables for people or one JSON object for programs.

Knows nothing about how either was made.
"""

from typing import Any

from rich.markup import escape
from rich.table import Table

from quantlab.cli.console import data_console, plain_table, print_json
from quantlab.quant.options import QuantizeOptions, Result
from quantlab.quant.plan import Plan, PlannedModule
from quantlab.quant.work import REPORT_FILE, timings_file
from quantlab.schemes import describe
from quantlab.units import human_bytes, human_count, human_seconds


def show_plan(plan: Plan, options: QuantizeOptions, as_json: bool) -> None:
    """Print a dry run on stdout."""
    if as_json:
        print_json(plan_json(plan, options))
        return
    console = data_console()
    console.print(
        f"[bold]{escape(str(options.source))}[/bold]  {plan.architecture}, {human_count(plan.parameters)} parameters"
    )
    console.print(_totals(plan, options))
    for table in (_modules(plan), _files(plan), _memory(plan)):
        if table.rows:
            console.print()
            console.print(table)
    for problem in plan.problems:
        console.print(f"[red]problem[/red]  {escape(problem)}")


def show_result(result: Result, plan: Plan, as_json: bool) -> None:
    """Print a finished run on stdout."""
    if as_json:
        print_json(result_json(result, plan))
        return
    table = plain_table(header=False)
    table.add_row("written", f"[bold]{escape(str(result.out))}[/bold]")
    table.add_row("size", _shrunk(result.bytes, plan.source_bytes))
    table.add_row("bits per weight", f"{result.bits_per_weight:.3f} in {result.modules} modules")
    table.add_row("time", human_seconds(result.seconds))
    table.add_row("report", escape(f"{result.out}/{REPORT_FILE}"))
    data_console().print(table)


def plan_json(plan: Plan, options: QuantizeOptions) -> dict[str, Any]:
    """The plan as plain values; sizes in bytes, time in seconds."""
    return {
        "source": str(options.source),
        "out": str(options.out),
        "architecture": plan.architecture,
        "parameters": plan.parameters,
        "recipe": plan.recipe,
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "files": [{"name": name, "bytes": size} for name, size in plan.files],
        "bits_per_weight": plan.bits_per_weight,
        "calibration_tokens": plan.tokens,
        "peak_memory_bytes": plan.peak_bytes,
        "memory": [{"what": item.what, "bytes": item.bytes} for item in plan.memory],
        "seconds": plan.seconds,
        "machine": plan.machine,
        "modules": [_module_json(module) for module in plan.modules],
        "problems": list(plan.problems),
    }


def result_json(result: Result, plan: Plan) -> dict[str, Any]:
    """A finished run as plain values."""
    return {
        "out": str(result.out),
        "recipe": plan.recipe,
        "modules": result.modules,
        "bits_per_weight": result.bits_per_weight,
        "bytes": result.bytes,
        "source_bytes": plan.source_bytes,
        "seconds": result.seconds,
        "report": str(result.out / REPORT_FILE),
        "timings": str(timings_file(result.out)),
    }


def _module_json(module: PlannedModule) -> dict[str, Any]:
    quantized = module.scheme is not None
    return {
        "name": module.name,
        "shape": list(module.shape),
        "scheme": describe(module.scheme),
        "quantized": quantized,
        "why": module.why,
        "bytes": module.bytes,
    }


def _totals(plan: Plan, options: QuantizeOptions) -> Table:
    table = plain_table(header=False)
    table.add_row("recipe", plan.recipe)
    if plan.files:
        table.add_row("output", _shrunk(plan.output_bytes, plan.source_bytes))
        table.add_row("bits per weight", f"{plan.bits_per_weight:.3f} (quantized modules)")
    spec = options.calibration
    blocks = "all blocks" if spec.samples is None else f"{spec.samples} blocks"
    source = spec.source or "the bundled text"
    table.add_row("calibration", f"{blocks} of {spec.seq_len} tokens of {escape(source)}, seed {spec.seed}")
    table.add_row("peak memory", f"about {human_bytes(plan.peak_bytes)} beyond the libraries' own")
    table.add_row("time", f"about {human_seconds(plan.seconds)} on {plan.machine}")
    return table


def _shrunk(size: int, source: int) -> str:
    ratio = f", {source / size:.2f}x smaller" if size and source > size else ""
    return f"{size:,} bytes ({human_bytes(size)}; was {human_bytes(source)}{ratio})"


def _modules(plan: Plan) -> Table:
    """Modules of one kind and treatment on one row: 32 blocks times 7 linears fit on a screen."""
    rows: dict[tuple[str, tuple[int, int], str, str], list[PlannedModule]] = {}
    for module in plan.modules:
        kind = module.name.split(".", 3)[-1] if module.name.startswith("model.layers.") else module.name
        rows.setdefault((kind, module.shape, describe(module.scheme), module.why or ""), []).append(module)
    table = plain_table("module", "scheme", "why", "count", "shape", "bytes", numbers=3)
    for (kind, (rows_out, columns), scheme, why), group in rows.items():
        size = human_bytes(sum(module.bytes for module in group))
        table.add_row(kind, scheme, escape(why), str(len(group)), f"{rows_out} x {columns}", size)
    return table


def _files(plan: Plan) -> Table:
    table = plain_table("file", "bytes", numbers=1)
    for name, size in plan.files:
        table.add_row(escape(name), f"{size:,}")
    if plan.files:
        table.add_row(REPORT_FILE, "with the run")
    return table


def _memory(plan: Plan) -> Table:
    table = plain_table("memory (estimate)", "", numbers=1)
    for item in plan.memory:
        if item.bytes:
            table.add_row(item.what, human_bytes(item.bytes))
    return table
