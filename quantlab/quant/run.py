"""From a checkpoint to a packed one: the blocks in order, the later stages, the folder. The one IO shell of `quant`.

Holds no maths: blocks are quantized by `blockwise`, trained by `refine`, kept by `journal`, written by `assemble`.
"""

import json
import time

import torch

from quantlab import __version__
from quantlab.checkpoint.sizes import entry_bytes, output_entries
from quantlab.checkpoint.writer import disk_errors, write_json
from quantlab.clock import Clock
from quantlab.events import Listener, Notice
from quantlab.models.naming import linear_shapes
from quantlab.quant.assemble import assemble
from quantlab.quant.blocks import quantize_blocks
from quantlab.quant.journal import Journal, open_journal
from quantlab.quant.options import QuantizeOptions, Result
from quantlab.quant.parts import Parts
from quantlab.quant.refine import refine
from quantlab.quant.report import ModuleRow, report_json
from quantlab.quant.setup import Setup, prepare
from quantlab.quant.work import REPORT_FILE, timings_file, work_folder
from quantlab.recipe import Distill


def quantize_checkpoint(options: QuantizeOptions, listener: Listener) -> Result:
    """Carry out `options`, continuing an interrupted run of the same inputs; raises a QuantlabError or nothing.

    The output appears whole or not at all, and a `<out>.timings.json` beside it, since the folder holds no times.
    """
    started, clock = time.perf_counter(), Clock()
    with clock.stage("prepare"):
        setup = prepare(options, listener)
    with open_journal(work_folder(options.out), setup.fingerprint, options.restart) as journal:
        report = published_report(setup) if setup.published else carry_out(setup, journal, clock)
        result = _result(setup, report, clock, time.perf_counter() - started)
        journal.remove()
    return result


def carry_out(setup: Setup, journal: Journal, clock: Clock) -> dict[str, object]:
    """All stages that the journal does not hold yet, and the folder; returns the report."""
    steps = quantize_blocks(setup, journal, clock)
    stages: dict[str, object] = {}
    distill = next((p for p in setup.options.recipe.passes if isinstance(p, Distill)), None)
    if distill is not None:
        with clock.stage("distill"):
            step, stages["distill"] = refine(setup, journal, Parts(journal, steps), distill)
        steps.append(step)
    report = build_report(setup, journal, stages)
    with clock.stage("write and verify"):
        assemble(setup, journal, Parts(journal, steps), report)
    return report


def published_report(setup: Setup) -> dict[str, object]:
    """The report of a run that was cut off with its output in place."""
    setup.listener(Notice("the output is in place already: only the work folder is left to remove"))
    return json.loads((setup.options.out / REPORT_FILE).read_text(encoding="utf-8"))


def build_report(setup: Setup, journal: Journal, stages: dict[str, object]) -> dict[str, object]:
    """quantlab_report.json from the journal's rows; the same for a continued run as for an uninterrupted one."""
    rows = [ModuleRow.from_json(row) for entry in journal.entries.values() for row in entry.get("rows", [])]
    order = {name: i for i, name in enumerate(linear_shapes(setup.config))}
    facts: dict[str, object] = {
        "quantlab": __version__,
        "torch": str(torch.__version__),
        "fingerprint": setup.fingerprint,
    }
    facts |= {"max_shard_size": setup.options.max_shard_size}
    recipe = setup.options.recipe.model_dump(mode="json", by_alias=True)
    return report_json(sorted(rows, key=lambda row: order[row.name]), recipe, facts, stages)


def _result(setup: Setup, report: dict, clock: Clock, seconds: float) -> Result:
    out = setup.options.out
    timings = {"seconds": round(seconds, 3), "stages": {k: round(v, 3) for k, v in clock.stages.items()}}
    beside = timings_file(out)
    with disk_errors(beside):
        beside.unlink(missing_ok=True)
    write_json(beside, timings)
    shapes = linear_shapes(setup.config)
    quantized = {name: scheme for name, scheme in setup.schemes.items() if scheme is not None}
    infos = [setup.checkpoint.tensors[f"{name}.weight"] for name in quantized]
    bits = 8 * sum(entry_bytes(entry) for entry in output_entries(infos, quantized))
    weights = sum(shapes[name][0] * shapes[name][1] for name in quantized)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Result(out, len(quantized), bits / weights, size, seconds, {**report, "timings": timings})
