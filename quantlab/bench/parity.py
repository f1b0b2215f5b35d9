"""Greedy texts of the engine against transformers' generate one prompt at a time: `make bench-parity`.

Prompts of mixed length arrive at random times, in every mode: prompts cut into pieces, prefixes shared, blocks running
out, few or many requests at once. Knows nothing about how the engine works, only what it must say.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from quantlab.bench.measure import SHIPPED_MODEL, SHIPPED_TEXT
from quantlab.errors import QuantlabError
from quantlab.runtime.build import build_engine
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Request, SamplingParams
from quantlab.text import load_tokenizer

BLOCK, SMALL_POOL = 16, 64
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A prompt, and how many tokens to write at most."""

    prompt: Ids
    tokens: int


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run the engine, and how many requests it works on at once."""

    name: str
    options: EngineOptions
    pool: int | None = None  # blocks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one mode did.

    `leads`: for each text that differs, by how many rounding steps of its dtype the reference's token beat the other
    where the two part. A lead of 0 is a tie, which the order of the vocabulary decided.
    """

    mode: str
    dtype: str
    prompts: int
    identical: int
    tokens: int
    leads: tuple[float, ...]
    preemptions: int
    recomputed_tokens: int
    prefix_hits: int
    steps: int
    most_running: int
    seconds: float


class Reference:
    """transformers on the CPU, one prompt at a time."""

    def __init__(self, folder: Path, dtype: str):
        self._model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
        ).eval()

    @torch.inference_mode()
    def continuation(self, work: Work) -> Ids:
        """The likeliest token each time, up to and with one that ends the text."""
        ids = torch.tensor([work.prompt])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.tokens, do_sample=False, num_beams=1
        )
        return tuple(out[0, len(work.prompt) :].tolist())

    @torch.inference_mode()
    def lead(self, prompt: Ids, said: Ids, other: Ids) -> float:
        """How far its own token was ahead of the other's where the two part, in steps of the larger logit's rounding.

        Infinite where one text ends and the other goes on.
        """
        shorter = min(len(said), len(other))
        at = next((i for i in range(shorter) if said[i] != other[i]), shorter)
        if at == shorter:
            return math.inf
        logits = self._model(torch.tensor([prompt + said[:at]])).logits[0, -1]
        own, others = float(logits[said[at]]), float(logits[other[at]])
        step = torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(own), abs(others))))
        return (own - others) / step


def draw_work(ids: Sequence[int], count: int, longest: int, tokens: int) -> list[Work]:
    """Pieces of a text, of lengths spread evenly over magnitudes from 1 to `longest`; a third begin as others do.

    Half are to be continued by `tokens` tokens, half by an eighth of that.
    """
    source = random.Random(0)
    works: list[Work] = []
    for number in range(count):
        length = round(longest ** source.random())
        start = source.randrange(len(ids) - length)
        own = tuple(ids[start : start + length])
        shared = works[source.randrange(number)].prompt[: longest // 2] if number % 3 == 2 else ()
        works.append(Work((shared + own)[:longest], tokens if number % 2 == 0 else max(1, tokens // 8)))
    return works


def modes(dtype: str, count: int, in_flight: Sequence[int]) -> Iterator[Mode]:
    """Every way that a request's text must not depend on."""
    base = EngineOptions("cpu", dtype, max_num_seqs=count, max_batch_tokens=4096, kv_memory=1 << 28, block_size=BLOCK)
    yield Mode("whole prompts", replace(base, prefix_caching=False))
    yield Mode("prompts in pieces", replace(base, prefix_caching=False, max_batch_tokens=max(count, 48)))
    yield Mode("prefix cache", replace(base, max_batch_tokens=256))
    yield Mode("preemption", replace(base, max_batch_tokens=256, prefix_caching=False), SMALL_POOL)
    yield Mode("preemption, prefix cache", replace(base, max_batch_tokens=256), SMALL_POOL)
    for number in in_flight:
        yield Mode(f"{number} at once", replace(base, max_num_seqs=number, max_batch_tokens=256))


def build(folder: Path, mode: Mode, longest: int) -> Engine:
    """The engine of `mode`; a small pool is measured in blocks of this very model."""
    options = replace(mode.options, max_model_len=longest)
    if mode.pool is not None:
        info = build_engine(folder, options).info
        memory = mode.pool * (info.kv_bytes // info.num_blocks)
        options = replace(options, kv_memory=memory, max_model_len=min(longest, mode.pool * BLOCK))
    return build_engine(folder, options)


def run(engine: Engine, works: Sequence[Work]) -> tuple[list[Ids], int]:
    """What the engine says to each prompt, and how many ran at once at most; they arrive in bursts between steps."""
    source = random.Random(1)
    waiting = [(str(i), work) for i, work in enumerate(works)]
    source.shuffle(waiting)
    said: dict[str, list[int]] = {name: [] for name, _ in waiting}
    most = 0
    while waiting or engine.has_work:
        for _ in range(source.choice((0, 0, 1, 8, 40)) if engine.has_work else 1):
            if waiting:
                name, work = waiting.pop()
                engine.add(Request(name, work.prompt, SamplingParams(max_tokens=work.tokens, temperature=0.0)))
        for event in engine.step():
            if event.error:
                raise QuantlabError(event.error)
            said[event.request_id] += event.token_ids
        most = max(most, engine.stats().running)
    return [tuple(said[str(i)]) for i in range(len(works))], most


def compare(folder: Path, mode: Mode, works: Sequence[Work], expected: Sequence[Ids]) -> Outcome:
    """Run one mode and hold it against what transformers said."""
    engine = build(folder, mode, max(len(work.prompt) + work.tokens for work in works))
    started = time.perf_counter()
    said, most = run(engine, works)
    seconds = time.perf_counter() - started
    wrong = [i for i, (a, b) in enumerate(zip(expected, said, strict=True)) if a != b]
    stats = engine.stats()
    reference = Reference(folder, engine.info.dtype) if wrong else None
    leads = [reference.lead(works[i].prompt, expected[i], said[i]) for i in wrong] if reference else []
    return Outcome(
        mode.name,
        engine.info.dtype,
        len(works),
        len(works) - len(wrong),
        stats.generation_tokens,
        tuple(round(lead, 3) for lead in leads),
        stats.preemptions,
        stats.recomputed_tokens,
        stats.prefix_hits,
        stats.steps,
        most,
        round(seconds, 2),
    )


def main() -> None:
    """Print one line of JSON a mode; exits with 1 when a text differs where the reference was sure of its own.

    Sums in 16 bits depend on how many tokens are computed together, so there a text may turn off at a tie, or where
    the lead is a single rounding step; in float32 none does.
    """
    parser = argparse.ArgumentParser(description="Greedy texts against transformers' generate, one at a time.")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--longest", type=int, default=512, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the longer texts")
    parser.add_argument("--in-flight", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--only", help="modes whose names have this in them")
    given = parser.parse_args()
    disable_progress_bar()
    ids = load_tokenizer(given.model).encode(SHIPPED_TEXT.read_text(encoding="utf-8")[: 1 << 19])
    works = draw_work(ids, given.prompts, given.longest, given.tokens)
    reference = Reference(given.model, given.dtype)
    started = time.perf_counter()
    expected = [reference.continuation(work) for work in works]
    asked = {"model": given.model.name, "prompt_tokens": sum(len(work.prompt) for work in works)}
    print(json.dumps({**asked, "reference_seconds": round(time.perf_counter() - started, 2)}), flush=True)
    same = True
    for mode in modes(given.dtype, given.prompts, given.in_flight):
        if given.only is None or given.only in mode.name:
            outcome = compare(given.model, mode, works, expected)
            same &= all(lead <= 1 for lead in outcome.leads)
            print(json.dumps(asdict(outcome)), flush=True)
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
