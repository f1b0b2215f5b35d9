"""What each part of the server's design gives, on this machine's CPU: `python -m quantlab.bench.serve_design`.

Static against continuous batching, worst-case against paged keys and values, with and without the prefix cache, 16-bit
against INT8 and INT4. Everything of ours is asked over HTTP except the memory part, which counts inside the engine.
Knows nothing about how any of it works.
usage: python -m quantlab.bench.serve_design [--shared DIR] [--parts batching,memory,prefix,schemes] [--rows FILE]
"""

import argparse
import gc
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

from quantlab.bench.measure import SHIPPED_MODEL, append_rows, evaluation_files, held_out_ids, quantize
from quantlab.bench.own_server import own_server
from quantlab.bench.serve import run_load
from quantlab.bench.serve_options import Level, LoadOptions, Span, Target, Work
from quantlab.bench.serve_summary import LevelResult
from quantlab.bench.serve_table import rate, seconds
from quantlab.bench.static_batches import Asked, run_static
from quantlab.errors import QuantlabError
from quantlab.runtime.build import build_engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams

PARTS = ("batching", "memory", "prefix", "schemes")
LENGTHS = ("long tail", "even")
CLIENTS = 32
PREFIX, QUESTION = 1000, 24
LENGTH = 1024  # of a sequence in the memory part, and of a worst-case block
ROOM = 8 * LENGTH  # tokens of keys and values in the memory part


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was measured, how, and how it compares with the line it stands under."""

    part: str
    what: str
    figures: dict[str, float]
    shown: str
    ratio: float | None = None


class Bench:
    """The parts, one model, one folder to work in."""

    def __init__(self, asked: argparse.Namespace, model: Path, files: list[Path]):
        self.asked, self.model, self.work = asked, model, asked.work
        self.ids = held_out_ids(model, files, 120_000).tolist()

    def rows(self) -> Iterator[Row]:
        """Each row as it is measured."""
        for part in self.asked.parts.split(","):
            yield from getattr(self, part)()

    def batching(self) -> Iterator[Row]:
        """The same requests, 32 at a time: padded batches in transformers, and our server with 32 clients."""
        for lengths in LENGTHS:
            asked = self.mixed(self.asked.requests, lengths)
            run = run_static(self.model, asked, CLIENTS, torch.bfloat16)
            wasted = 100 * (1 - run.output_tokens / run.computed_tokens)
            shown = f"{rate(run.rate)} tok/s, {wasted:.0f} % of the tokens it computed unasked"
            figures = {"output_rate": run.rate, "seconds": run.seconds}
            yield Row("batching", f"{lengths}: transformers generate, padded batches of {CLIENTS}", figures, shown)
            level = self.served(self.model, CLIENTS, asked)
            ratio = level.output_rate / run.rate
            shown = f"{rate(level.output_rate)} tok/s, first token {seconds(level.ttft.p50)}, {ratio:.2f}x"
            figures = {"output_rate": level.output_rate, "seconds": level.seconds, "ttft_p50": level.ttft.p50}
            yield Row("batching", f"{lengths}: quantlab serve, {CLIENTS} clients", figures, shown, ratio)

    def memory(self) -> Iterator[Row]:
        """How many sequences run at once in the same memory, with a block for the longest one and with blocks of 16."""
        before = None
        for block, what in ((LENGTH, f"worst case: a block is {LENGTH} tokens"), (16, "paged: a block is 16 tokens")):
            most, spent, tokens = self.crowd(block)
            ratio = None if before is None else most / before
            before = before or most
            shown = f"{most} at once, {rate(tokens / spent)} tok/s" + ("" if ratio is None else f", {ratio:.2f}x")
            yield Row("memory", what, {"at_once": most, "output_rate": tokens / spent}, shown, ratio)

    def crowd(self, block: int) -> tuple[int, float, int]:
        """(most sequences at once, seconds, output tokens) of 64 requests in ROOM tokens of keys and values."""
        probe = build_engine(self.model, EngineOptions(block_size=16, max_model_len=16, threads=self.asked.threads))
        memory = probe.info.kv_bytes // probe.info.num_blocks // 16 * ROOM
        del probe
        gc.collect()
        # Our scheduler keeps a block free for each sequence to grow into, which sequences in worst-case blocks never
        # do: they get as many as an allocator without blocks would give them, and the room that the rule asks for.
        paged = block < LENGTH
        options = EngineOptions(
            block_size=block,
            kv_memory=memory if paged else 2 * memory,
            max_model_len=LENGTH,
            max_num_seqs=64 if paged else ROOM // LENGTH,
            prefix_caching=False,
            threads=self.asked.threads,
        )
        engine = build_engine(self.model, options)
        asked = self.mixed(64)
        for number, (ids, count) in enumerate(asked):
            engine.add(
                Request(str(number), tuple(ids), SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
            )
        most, begin = 0, perf_counter()
        while engine.has_work:
            engine.step()
            most = max(most, engine.stats().running)
        return most, perf_counter() - begin, sum(count for _, count in asked)

    def prefix(self) -> Iterator[Row]:
        """Time to first token of questions that share their first thousand tokens."""
        before = None
        for words, what in ((["--no-prefix-caching"], "without prefix cache"), ([], "with prefix cache")):
            shared = self.ids[:PREFIX]
            own = [(shared + self.ids[PREFIX + QUESTION * i : PREFIX + QUESTION * (i + 1)], 8) for i in range(40)]
            level = self.served(self.model, 1, own, words)
            ratio = None if before is None else before / level.ttft.p50
            before = before or level.ttft.p50
            share = 100 * level.cached_tokens / level.prompt_tokens
            shown = f"first token {seconds(level.ttft.p50)}, {share:.0f} % of prompt tokens cached"
            shown += "" if ratio is None else f", {ratio:.1f}x sooner"
            yield Row("prefix", f"{what}, {PREFIX} + {QUESTION} tokens", {"ttft_p50": level.ttft.p50}, shown, ratio)

    def schemes(self) -> Iterator[Row]:
        """One client and 32 of them, on the 16-bit model and its INT8 and INT4 versions."""
        before = None
        for scheme in (None, "w8a8", "w4a16"):
            folder = self.model if scheme is None else self.packed(scheme)
            one = self.served(folder, 1, [(ids, 64) for ids, _ in self.mixed(6)])
            many = self.served(folder, CLIENTS, self.mixed(self.asked.requests))
            alone = 1 / one.itl.p50
            ratio = None if before is None else alone / before
            before = before or alone
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
            shown = f"{size:.1f} MB; one client {rate(alone)} tok/s, {CLIENTS} clients {rate(many.output_rate)} tok/s"
            figures = {"alone": alone, "output_rate": many.output_rate, "ttft_p50": many.ttft.p50, "mb": size}
            yield Row("schemes", scheme or "16-bit", figures, shown, ratio)

    def packed(self, scheme: str) -> Path:
        """The model quantized by the quick recipe, made once."""
        out = Path(self.work / f"{self.model.name}-{scheme}")
        if not (out / "config.json").is_file():
            quantize(self.model, out, ["--scheme", scheme, "--quality", "fast", "--device", "cpu"])
        return out

    def mixed(self, count: int, lengths: str = LENGTHS[0]) -> list[Asked]:
        """Requests with prompts from the held-out text, seeded: lengths of prompt and answer are drawn separately,
        exponential as people's are (mean 64 tokens, at most 512), or evenly from 16 to 256."""
        draw = random.Random(f"0 {lengths}")
        found = []
        for _ in range(count):
            size, answer = (
                min(512, 1 + int(draw.expovariate(1 / 64))) if lengths == LENGTHS[0] else draw.randint(16, 256)
                for _ in range(2)
            )
            start = draw.randrange(len(self.ids) - 512)
            found.append((self.ids[start : start + size], answer))
        return found

    def served(self, folder: Path, clients: int, asked: list[Asked], words: list[str] | None = None) -> LevelResult:
        """The figures of `clients` who ask our server for all of `asked`, in order."""
        prompts = self.work / "prompts.jsonl"
        prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts.write_text("".join(json.dumps({"prompt": ids, "max_tokens": n}) + "\n" for ids, n in asked))
        options = ["--threads", str(self.asked.threads), "--max-num-seqs", str(CLIENTS), *(words or [])]
        with own_server(folder, options, self.work / "serve.log") as server:
            work = Work(Span(128, 128), Span(16, 16), prompts)
            load = LoadOptions(Target(server.url), (Level(concurrency=clients),), work, requests=len(asked), warmup=2)
            (level,) = run_load(load, lambda level: None).levels
        if level.succeeded != len(asked):
            raise QuantlabError(f"{len(asked) - level.succeeded} requests failed: {level.failures}")
        return level


def table(rows: list[Row]) -> Table:
    """Every row under its part."""
    view = Table(title="what each part of the server gives", title_justify="left")
    for column in ("part", "how", "figures"):
        view.add_column(column)
    for row in rows:
        first = next(other for other in rows if other.part == row.part) is row
        view.add_row(row.part if first else "", row.what, row.shown)
        if next(other for other in reversed(rows) if other.part == row.part) is row:
            view.add_section()
    return view


def arguments() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(description="what each part of the server's design gives on this machine's CPU")
    parser.add_argument("--model", type=Path, help="16-bit folder; the shipped model by default")
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/: takes books-28m and its texts")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--requests", type=int, default=128, help="of the parts with 32 clients")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("work/bench/serve"))
    parser.add_argument("--rows", type=Path, help="append the figures as JSON lines to this file")
    asked = parser.parse_args()
    if unknown := set(asked.parts.split(",")) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return asked


def main() -> None:
    """Measure part by part, then print the table."""
    asked = arguments()
    torch.set_num_threads(asked.threads)
    shared = asked.shared / "models" / "books-28m" if asked.shared else None
    if asked.model is None and shared is not None and not shared.exists():
        sys.exit(f"{shared} is not there; without --shared the bench takes the shipped model and text")
    model = asked.model or shared or SHIPPED_MODEL
    texts = [asked.shared / "data" / "books" / "eval"] if asked.shared else None
    rows = []
    try:
        for row in Bench(asked, model, evaluation_files(texts)).rows():
            rows.append(row)
            sys.stderr.write(f"{row.part}: {row.what}: {row.shown}\n")
            figures = {"bench": "serve", "model": model.name, "part": row.part, "what": row.what, "ratio": row.ratio}
            append_rows(asked.rows, [figures | row.figures])
    except QuantlabError as error:
        sys.exit(error.one_line())
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))


if __name__ == "__main__":
    main()
