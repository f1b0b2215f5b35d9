"""A load test as rows of words, for the terminal and the page alike.

Knows nothing about how a table is drawn.
"""

from quantlab.bench.serve_result import LoadResult
from quantlab.bench.serve_summary import LevelResult, Spread
from quantlab.errors import printable
from quantlab.eval.reports.tables import Row, Table

FEW = 100  # requests, under which the highest of a hundred is the highest of all


def seconds(value: float) -> str:
    """`850 us`, `12.3 ms`, `1.27 s`: three digits."""
    if value == 0:
        return "0"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def rate(value: float) -> str:
    """`0.42`, `31.7`, `1,284`: at least three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def load_table(result: LoadResult) -> Table:
    """A row for each level: what was delivered, and how long it took its users."""
    columns: Row = ("load", "answers", "requests/s", "output tok/s", "total tok/s")
    columns += ("TTFT p50", "TTFT p90", "TTFT p99", "ITL p50", "ITL p99", "E2E p50", "E2E p99")
    limited = any(level.good is not None for level in result.levels)
    if limited:
        columns += ("within limits", "goodput/s")
    rows = tuple(_row(level, limited) for level in result.levels)
    return Table("Load", columns, rows, len(columns) - 1, note=_note(result))


def failure_table(result: LoadResult) -> Table | None:
    """Every failure by name and level; None if there was none."""
    rows = [
        (level.name, printable(name), f"{count:,}") for level in result.levels for name, count in level.failures.items()
    ]
    return Table("Failures", ("load", "failure", "requests"), tuple(rows), 1) if rows else None


def length_table(result: LoadResult) -> Table:
    """What was really sent and received, by the server's own count."""
    columns = (
        "load",
        "seconds",
        "sent",
        "prompt tokens each",
        "output tokens each",
        "from prefix cache",
        "late p99",
    )
    rows = tuple(
        (
            level.name,
            f"{level.seconds:.1f}",
            f"{level.sent:,}",
            _each(level.prompt_tokens, level.succeeded),
            _each(level.output_tokens, level.succeeded),
            f"{100 * level.cached_tokens / level.prompt_tokens:.1f} %" if level.prompt_tokens else "",
            seconds(max(level.late, 0.0)),
        )
        for level in result.levels
    )
    return Table("Lengths", columns, rows, len(columns) - 1)


def asked(result: LoadResult) -> Table:
    """What would be needed to measure it again."""
    options, work, server = result.options, result.options.work, result.server
    source = str(work.prompts) if work.prompts else f"bundled text, {work.input} prompt and {work.output} output tokens"
    limits = [f"{name} {seconds(value)}" for name, value in _limits(result) if value is not None]
    rows: list[Row] = [
        ("server", printable(options.target.base_url)),
        ("model", printable(server.model)),
        ("version", server.version),
        ("route", "/v1/chat/completions" if options.target.api == "chat" else "/v1/completions"),
        ("requests", f"at most {options.requests:,} a level"),
        ("prompts", printable(source)),
        ("shared prefix", f"{work.shared_prefix:,} tokens" if work.shared_prefix else ""),
        ("sampling", f"temperature {work.temperature:g}, seed {work.seed}"),
        ("end of text", "ignored" if work.ignore_eos else "ends an answer"),
        ("limits", ", ".join(limits)),
        ("tokens a word", _rate_words(result)),
        ("measured", result.created),
    ]
    return Table("How it was measured", ("", " "), tuple(row for row in rows if row[1]))


def _row(level: LevelResult, limited: bool) -> Row:
    cells: Row = (level.name, f"{level.succeeded:,} of {level.sent:,}")
    cells += tuple(rate(value) for value in (level.request_rate, level.output_rate, level.total_rate))
    cells += (*_times(level.ttft, "p50", "p90", "p99"), *_times(level.itl, "p50", "p99"))
    cells += _times(level.e2e, "p50", "p99")
    if limited:
        share = f"{100 * (level.good or 0) / level.sent:.1f} %" if level.sent else ""
        cells += (share, rate(level.goodput or 0.0))
    return cells


def _times(spread: Spread, *names: str) -> Row:
    return tuple(seconds(getattr(spread, name)) if spread.count else "" for name in names)


def _each(tokens: int, requests: int) -> str:
    return f"{tokens / requests:,.1f}" if requests else ""


def _limits(result: LoadResult) -> tuple[tuple[str, float | None], ...]:
    limits = result.options.limits
    return ("first token", limits.ttft), ("each further token", limits.tpot), ("whole answer", limits.e2e)


def _rate_words(result: LoadResult) -> str:
    found = result.tokens_per_word
    return f"{found.per_word:.3f}, {'as the server counts' if found.measured else 'assumed: the server does not count'}"


def _note(result: LoadResult) -> str:
    notes = ["Times count from when a request was due; tokens are the server's count."]
    if not all(level.counted_by_server for level in result.levels):
        notes = ["Times count from when a request was due; this server gives no usage, so tokens are pieces of text."]
    if any(0 < level.succeeded < FEW for level in result.levels):
        notes.append(f"With fewer than {FEW} answers p99 is close to the largest of all.")
    if any(level.late > 0.05 for level in result.levels):
        notes.append("The client itself fell behind (late p99): it, not the server, may be what was measured.")
    return " ".join(notes)
