"""The report's tables as rows of words: the terminal, Markdown and HTML draw the same ones.

Every cell is one printable line. Knows nothing about how a table is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.eval.reports.words import (
    exp,
    in_order,
    one_line,
    percent,
    percent_with_error,
    perplexity,
    points,
    small,
    why,
    with_error,
)
from quantlab.eval.result import GateLine, Report, TaskResult, TextNoise, TextResult, Verdict
from quantlab.eval.statistics import interval
from quantlab.units import human_bytes, human_count, human_seconds

Row = tuple[str, ...]
TOTAL = "total"  # among the stages of `seconds`


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the last `numbers` columns hold numbers. `verdicts` has one for each row, or is empty."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    numbers: int = 0
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""

    def first(self, count: int) -> "Table":
        """The first `count` rows, with a note of how many were left out."""
        left = len(self.rows) - count
        if left <= 0:
            return self
        note = f"{self.note} {left:,} more rows are in report.json.".strip()
        return Table(self.title, self.columns, self.rows[:count], self.numbers, self.verdicts[:count], note)


def gate_table(report: Report) -> Table | None:
    """The gate's lines, the missed ones first; None without a gate."""
    if report.gate is None:
        return None
    lines = in_order(report.gate)
    return Table(
        "Gate",
        ("verdict", "metric", "requirement", "why"),
        tuple(_gate_row(line) for line in lines),
        verdicts=tuple(line.verdict for line in lines),
        note=f"Gate: {one_line(report.gate.source)}; alpha {report.gate.alpha:g}.",
    )


def cost_table(report: Report) -> Table:
    """Size and, for each text, perplexity and distance to the baseline."""
    before, after = report.baseline, report.candidate
    rows: list[Row] = [
        ("size", human_bytes(before.bytes), human_bytes(after.bytes), shrink(report), ""),
        ("bits per weight", f"{before.bits_per_weight:.3f}", f"{after.bits_per_weight:.3f}", "", ""),
    ]
    for text in report.texts:
        rows += _text_rows(text, noise_of(report, text.name), len(report.texts) > 1)
    note = (
        "Baseline against candidate; ± is one standard error, clustered by window. In brackets: the two-sided 95 % "
        "interval; a gate's bounds are one-sided."
    )
    return Table("Cost", ("figure", "baseline", "candidate", "change", "noise floor"), tuple(rows), 4, note=note)


def task_table(report: Report) -> Table | None:
    """Both models' score on each task; None without tasks."""
    if not report.tasks:
        return None
    columns: Row = ("task", "items", "baseline", "candidate", "difference", "95 % interval", "lost", "won", "p worse")
    note = (
        "Differences in percentage points, paired by item. Lost: right to wrong; won: wrong to right. "
        "p worse: exact one-sided McNemar. Could catch: the smallest drop that this many items show with 80 % power."
    )
    columns += ("could catch", "noise flips")
    return Table("Tasks", columns, tuple(_task_row(report, task) for task in report.tasks), 10, note=note)


def provenance(report: Report) -> Table:
    """What would be needed to measure it again."""
    rows: list[Row] = []
    for role, model in (("baseline", report.baseline), ("candidate", report.candidate)):
        rows += [
            (role, f"{one_line(model.path)} ({one_line(model.architecture)}, {one_line(model.scheme)})"),
            (f"{role} weights", model.weights),
            (f"{role} tokenizer", model.tokenizer),
        ]
    for text in report.texts:
        p = text.protocol
        counts = f"{p.tokens:,} tokens, {p.words:,} words, {p.bytes:,} bytes"
        told = f"{one_line(p.name)}: windows of {p.window:,}, bos {p.bos}, {one_line(p.dtype)}; {counts}"
        name = one_line(text.name)
        rows += [(f"text {name}", told), (f"text {name} bytes", p.text), (f"text {name} protocol", p.digest)]
    rows += [(f"task {one_line(task.name)} data", task.data) for task in report.tasks]
    if report.served is not None:
        rows += [("candidate ran", f"as served, keys and values in {one_line(report.served.kv_dtype)}")]
        rows += [("", one_line(kernel)) for kernel in report.served.kernels]
    rows += _circumstances(report)
    return Table("Provenance", ("what", "value"), tuple(rows), note="Digests are SHA-256.")


def shrink(report: Report) -> str:
    """`1.80x smaller`, or how much larger."""
    before, after = report.baseline.bytes, report.candidate.bytes
    if min(before, after) <= 0 or before == after:
        return ""
    ratio, word = (before / after, "smaller") if before > after else (after / before, "larger")
    return f"{ratio:.2f}x {word}"


def ratio(text: TextResult) -> str:
    """`x 1.0431 (1.039 to 1.047)`: the perplexities' ratio and its 95 % interval."""
    middle = f"x {exp(text.log_ratio.value):.4f}"
    if text.log_ratio.standard_error is None:
        return middle
    low, high = interval(text.log_ratio)
    return f"{middle} ({exp(low):.4f} to {exp(high):.4f})"


def duration(report: Report) -> float:
    """Seconds of the whole evaluation: as measured, else of all stages together."""
    return report.seconds.get(TOTAL, sum(report.seconds.values()))


def pooled(tasks: Sequence[TaskResult]) -> tuple[float, float]:
    """(baseline's accuracy, its change) with every item counting the same, as the gate's `tasks.accuracy` does."""
    items = sum(task.items for task in tasks)
    right = sum(task.baseline.value * task.items for task in tasks)
    return right / items, sum(task.wrong_to_right - task.right_to_wrong for task in tasks) / items


def noise_of(report: Report, name: str) -> TextNoise | None:
    """The noise floor of one text, where it was measured."""
    texts = report.noise.texts if report.noise else ()
    return next((noise for noise in texts if noise.name == name), None)


def _gate_row(line: GateLine) -> Row:
    return line.verdict, one_line(line.metric), one_line(line.requirement), why(line)


def _text_rows(text: TextResult, noise: TextNoise | None, several: bool) -> list[Row]:
    of = f", {one_line(text.name, 40)}" if several else ""
    floor = ("", "", "") if noise is None else _floor(noise)
    before, after = perplexity(text.baseline_perplexity.value), perplexity(text.perplexity.value)
    bits = f"{text.baseline_bits_per_byte:.4f}", f"{text.bits_per_byte:.4f}"
    return [
        (f"perplexity {one_line(text.protocol.name, 40)}{of}", before, after, ratio(text), floor[0]),
        (f"bits per byte{of}", *bits, f"{text.bits_per_byte - text.baseline_bits_per_byte:+.4f}", ""),
        (f"KL divergence, mean nats{of}", "", with_error(text.kl.mean), "", floor[1]),
        (f"KL divergence, 99.9 %{of}", "", small(text.kl.p999), "", ""),
        (f"same top token{of}", "", percent_with_error(text.agreement), "", floor[2]),
        (f"RMS change of p(right token){of}", "", percent_with_error(text.delta_p_rms), "", ""),
    ]


def _floor(noise: TextNoise) -> Row:
    return f"x {exp(noise.log_ratio):.4f}", small(noise.kl), percent(1 - noise.disagreement)


def _task_row(report: Report, task: TaskResult) -> Row:
    floors = report.noise.tasks if report.noise else ()
    floor = next((f"{noise.flips:,} of {noise.items:,}" for noise in floors if noise.name == task.name), "")
    return (
        f"{one_line(task.name, 60)} {one_line(task.metric, 20)}",
        f"{task.items:,}",
        percent(task.baseline.value),
        percent(task.candidate.value),
        points(task.difference.value),
        f"{points(task.low)} to {points(task.high)}",
        f"{task.right_to_wrong:,}",
        f"{task.wrong_to_right:,}",
        f"{task.mcnemar_p:.2g}",
        f"{100 * task.smallest_drop:.1f}",
        floor,
    )


def _circumstances(report: Report) -> list[Row]:
    machine = report.machine
    versions = f"quantlab {one_line(report.quantlab)}, torch {one_line(machine.torch)}"
    rows: list[Row] = [
        ("versions", f"{versions}, transformers {one_line(machine.transformers)}"),
        ("machine", f"{one_line(machine.device)}, {machine.threads:,} threads"),
        ("baseline's figures", "from the cache" if report.baseline_from_cache else "measured now"),
        ("made", one_line(report.created)),
    ]
    if report.noise:
        first, second = report.noise.batch_sizes
        rows.append(("noise floor", f"the baseline at batch size {first:,} against itself at {second:,}"))
    if report.texts:
        rows.append(("scored", f"{human_count(sum(text.protocol.tokens for text in report.texts))} tokens"))
    if report.seconds:
        stages = {name: seconds for name, seconds in report.seconds.items() if name != TOTAL}
        told = ", ".join(f"{one_line(name, 40)} {human_seconds(seconds)}" for name, seconds in stages.items())
        rows.append(("time", f"{human_seconds(duration(report))} ({one_line(told, 400)})"))
    return rows
