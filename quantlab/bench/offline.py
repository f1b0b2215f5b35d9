"""The engine without a server, on random weights of known shapes: `python -m quantlab.bench.offline`.

One JSON line for each scheme and case, ceilings of the machine first on a GPU; a table at the end. First tokens and
throughput are cases of their own. transformers serves the same shapes in the same run where it is asked for.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantlab.bench import offline_baselines as baselines
from quantlab.bench.gpu_timing import environment, measure_ceilings
from quantlab.bench.offline_run import (
    Prompts,
    profile_decode,
    step_bytes,
    time_decode,
    time_first_token,
    time_prefill,
    time_workload,
)
from quantlab.bench.random_folder import write_folder
from quantlab.bench.random_source import SCHEMES, SHAPES, RandomSource, random_config
from quantlab.runtime.backend import choose_backend
from quantlab.runtime.build import Identity, build_engine, engine_of
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.sizes import limits_of
from quantlab.runtime.weights import Weights, build_weights

CASES = ("decode", "batch", "prefill", "ttft", "profile", "workload")
WORKLOADS = "128/128x1024,1000/1000x256,128/2048x256"


@dataclass(frozen=True, slots=True)
class Setup:
    """One engine to measure: weights in `scheme`, keys and values in `kv`."""

    scheme: str
    kv: str
    int8_head: bool

    @property
    def name(self) -> str:
        """`int4`, `int4 kv8`, `int4 kv8 head8`."""
        return self.scheme + (" kv8" if self.kv == "int8" else "") + (" head8" if self.int8_head else "")


class Bench:
    """Runs cases and writes rows as they come."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.gpu = torch.cuda.is_available() and arguments.device != "cpu"
        self.read_tbs = 0.0
        if self.gpu:
            ceilings = measure_ceilings()
            self.read_tbs = max(ceilings.copy_tbs, ceilings.read_tbs)
            self.write({"case": "ceilings"} | asdict(ceilings) | environment())

    def write(self, row: dict[str, Any]) -> None:
        """One JSON line to stdout and to the file."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.arguments.out is not None:
            with self.arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def run(self) -> None:
        """Every setup in turn, weights made once for each scheme, then transformers."""
        setups = parse_setups(self.arguments.setups) if self.arguments.setups else []
        for scheme, head in dict.fromkeys((setup.scheme, setup.int8_head) for setup in setups):
            begin = time.perf_counter()
            options = self.options("auto", head)
            config = random_config(self.arguments.shape)
            backend = choose_backend(options, config)
            source = RandomSource(config, SCHEMES[scheme], backend.dtype, backend.device)
            weights = build_weights(source, backend, limits_of(options, config, backend.device).max_model_len)
            made = time.perf_counter() - begin
            for setup in setups:
                if (setup.scheme, setup.int8_head) == (scheme, head):
                    engine = engine_of(
                        weights,
                        backend,
                        self.options(setup.kv, head),
                        Identity(self.arguments.shape, scheme, ()),
                        None,
                        time.perf_counter(),
                    )
                    self.measure(setup, engine, weights, made)
                    del engine
                    release()
            del weights
            release()
        for scheme in filter(None, self.arguments.load.split(",")):
            self.load(scheme)
        for baseline in filter(None, self.arguments.baselines.split(",")):
            self.baseline(baseline)

    def load(self, scheme: str) -> None:
        """Seconds from a folder to an engine that is ready, twice: as restarts do, the second finds kernels compiled."""
        device = torch.device("cuda" if self.gpu else "cpu")
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            size = write_folder(folder, self.arguments.shape, SCHEMES[scheme], device)
            for attempt in ("first", "again"):
                release()
                engine = build_engine(folder, self.options("auto", False))
                row = {"bytes": size, "start_s": engine.info.startup_seconds, "attempt": attempt}
                self.write({"setup": scheme, "case": "load"} | row)
                del engine

    def options(self, kv: str, int8_head: bool) -> EngineOptions:
        """What the engine is built with; no two prompts are alike, so there is no prefix to find."""
        a = self.arguments
        options = EngineOptions(device=a.device, max_model_len=a.max_model_len, max_num_seqs=a.max_num_seqs)
        options = replace(options, max_batch_tokens=a.max_batch_tokens, threads=a.threads, int8_head=int8_head)
        return replace(options, kv_dtype="int8" if kv == "int8" else "auto", prefix_caching=False)

    def measure(self, setup: Setup, engine: Engine, weights: Weights, made: float) -> None:
        """Every case of one engine."""
        info, prompts = engine.info, Prompts(engine.info.vocab_size)
        token_bytes = info.kv_bytes // info.kv_tokens
        about = {"kernels": info.kernels, "weight_bytes": info.weight_bytes, "kv_tokens": info.kv_tokens}
        about |= {"kv_token_bytes": token_bytes}
        self.write({"setup": setup.name, "case": "build", "weights_s": made, "start_s": info.startup_seconds} | about)
        cases = self.arguments.cases.split(",")
        shapes = [("decode", 1, c) for c in (128, 2048)] + [("batch", s, 1024) for s in (8, 32, 64)]
        for case, sequences, context in shapes:
            if case in cases and sequences <= info.max_num_seqs and context + 256 <= info.max_model_len:
                steps = self.arguments.steps
                found = time_decode(engine, prompts, sequences, context, steps)
                row = asdict(found) | {"tokens_per_second": found.tokens_per_second}
                if self.gpu:
                    floor = step_bytes(weights, sequences, context, token_bytes) / (self.read_tbs * 1e12)
                    row |= {"floor_seconds": floor, "of_floor": floor / found.step_seconds}
                self.write({"setup": setup.name, "case": case} | row)
        other: dict[str, Callable[[], None]] = {
            "profile": lambda: self.profile(setup, engine, prompts),
            "prefill": lambda: self.prefill(setup, engine, prompts),
            "ttft": lambda: self.first_token(setup, engine, prompts),
            "workload": lambda: self.workloads(setup, engine, prompts),
        }
        for case, act in other.items():
            if case in cases:
                act()

    def profile(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """What the device does in decode steps."""
        for sequences, context in ((1, 128), (64, 1024)):
            if self.gpu and sequences <= engine.info.max_num_seqs and context + 256 <= engine.info.max_model_len:
                found = profile_decode(engine, prompts, sequences, context)
                top = dict(sorted(found.kernels.items(), key=lambda item: -item[1][0])[:14])
                row = {"sequences": sequences, "context": context, "idle": found.idle, "step_us": found.step_us}
                self.write({"setup": setup.name, "case": "profile"} | row | {"kernels": top})

    def prefill(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Prompt tokens a second."""
        time_prefill(engine, prompts, 1, min(512, engine.info.max_model_len - 8))
        for count, prompt in ((1, 2048), (4, 2048), (1, 8192)):
            if prompt < engine.info.max_model_len:
                rate = time_prefill(engine, prompts, count, prompt)
                row = {"sequences": count, "prompt": prompt, "prompt_tokens_per_second": rate}
                self.write({"setup": setup.name, "case": "prefill"} | row)

    def first_token(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Seconds to the first token of a lone request."""
        for prompt in (32, 128, 1024):
            seconds = time_first_token(engine, prompts, prompt)
            self.write({"setup": setup.name, "case": "ttft", "prompt": prompt, "seconds": seconds})

    def workloads(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Whole workloads, all requests there at the start."""
        for prompt, output, count in parse_workloads(self.arguments.workloads):
            found = time_workload(engine, prompts, count, prompt, output)
            self.write({"setup": setup.name, "case": "workload"} | asdict(found) | {"output_rate": found.output_rate})

    def baseline(self, name: str) -> None:
        """transformers on the same shapes, bf16."""
        run = {"static": baselines.static_generate, "continuous": baselines.continuous_batching}[name]
        for prompt, output, count in parse_workloads(self.arguments.baseline_workloads):
            found = run(random_config(self.arguments.shape), self.arguments.device, (prompt, output, count))
            self.write({"setup": f"transformers {name}", "case": "workload"} | found)
        release()


def parse_setups(text: str) -> list[Setup]:
    """`int4,int4+kv8,int4+kv8+head8` -> setups."""
    found = []
    for word in text.split(","):
        scheme, *extras = word.split("+")
        found.append(Setup(scheme, "int8" if "kv8" in extras else "auto", "head8" in extras))
        if scheme not in SCHEMES or set(extras) - {"kv8", "head8"}:
            raise SystemExit(f"setup {word!r}: one of {', '.join(SCHEMES)} with +kv8 and +head8")
    return found


def parse_workloads(text: str) -> list[tuple[int, int, int]]:
    """`128/128x1024` -> (prompt, output, requests)."""
    found = []
    for word in filter(None, text.split(",")):
        lengths, _, count = word.partition("x")
        prompt, _, output = lengths.partition("/")
        found.append((int(prompt), int(output), int(count)))
    return found


def release() -> None:
    """Give unused device memory back, so that the next engine can measure it as free."""
    gc.collect()  # an engine's parts know each other
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each figure."""
    lines = []
    for row in rows:
        kind = row["case"]
        if kind in ("decode", "batch"):
            floor = f", {row['of_floor']:.0%} of the byte floor" if "of_floor" in row else ""
            what = f"{row['sequences']} x {row['context']}: {row['step_seconds'] * 1e3:.3f} ms"
            lines.append(f"{row['setup']}: decode {what}, {row['tokens_per_second']:.0f} tok/s{floor}")
        elif kind == "prefill":
            what = f"{row['sequences']} x {row['prompt']}"
            lines.append(f"{row['setup']}: prefill {what}: {row['prompt_tokens_per_second']:.0f} tok/s")
        elif kind == "ttft":
            lines.append(f"{row['setup']}: first token of {row['prompt']}: {row['seconds'] * 1e3:.2f} ms")
        elif kind == "workload":
            what = f"{row['prompt']}/{row['output']} x {row['requests']}"
            lines.append(f"{row['setup']}: {what}: {row['output_rate']:.0f} output tok/s in {row['seconds']:.1f} s")
        elif kind == "profile":
            what = f"{row['sequences']} x {row['context']}"
            lines.append(f"{row['setup']}: {what}: device idle {row['idle']:.1%} of {row['step_us']:.0f} us a step")
        elif kind == "load":
            lines.append(f"{row['setup']}: {row['attempt']} start from a folder: {row['start_s']:.1f} s")
        elif kind == "build":
            lines.append(f"{row['setup']}: weights {row['weights_s']:.1f} s, ready after {row['start_s']:.1f} s more")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="quantlab.bench.offline", description=__doc__)
    made.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    made.add_argument("--setups", default="bf16,int8,int4,int4+kv8")
    made.add_argument("--cases", default=",".join(CASES))
    made.add_argument("--workloads", default=WORKLOADS)
    made.add_argument("--baselines", default="", help="static, continuous or both, by commas")
    made.add_argument("--baseline-workloads", default="128/128x64")
    made.add_argument("--load", default="", help="schemes whose start from a folder is timed")
    made.add_argument("--device", default="auto")
    made.add_argument("--max-model-len", type=int, default=16384)
    made.add_argument("--max-num-seqs", type=int)
    made.add_argument("--max-batch-tokens", type=int)
    made.add_argument("--threads", type=int)
    made.add_argument("--steps", type=int, default=48)
    made.add_argument("--out", type=Path)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench(parser().parse_args(arguments))
    bench.run()
    print(summary(bench.rows), file=sys.stderr)


if __name__ == "__main__":
    main()
