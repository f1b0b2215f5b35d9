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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantlab.bench import offline_baselines as baselines
from quantlab.bench.gpu_timing import environment, measure_ceilings
from quantlab.bench.offline_options import (
    BASELINES,
    CASES,
    SCHEME_NAMES,
    SHAPE_NAMES,
    WORKLOADS,
    OfflineOptions,
    Setup,
    parse_names,
    parse_setups,
    parse_workloads,
)
from quantlab.bench.offline_run import (
    Profile,
    Prompts,
    profile_decode,
    profile_prefill,
    step_bytes,
    time_decode,
    time_first_token,
    time_prefill,
    time_workload,
)
from quantlab.bench.random_folder import write_folder
from quantlab.bench.random_source import SCHEMES, RandomSource, random_config
from quantlab.runtime.backend import choose_backend
from quantlab.runtime.build import Identity, build_engine, engine_of
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.sizes import limits_of
from quantlab.runtime.weights import Weights, build_weights


class Bench:
    """Runs cases and writes rows as they come."""

    def __init__(self, options: OfflineOptions):
        self.asked = options
        self.rows: list[dict[str, Any]] = []
        self.gpu = torch.cuda.is_available() and options.device != "cpu"
        self.read_tbs = 0.0
        if self.gpu:
            ceilings = measure_ceilings()
            self.read_tbs = max(ceilings.copy_tbs, ceilings.read_tbs)
            self.write({"case": "ceilings"} | asdict(ceilings) | environment())

    def write(self, row: dict[str, Any]) -> None:
        """One JSON line to stdout and to the file."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.asked.out is not None:
            with self.asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def run(self) -> None:
        """Every setup in turn, weights made once for each scheme, then starts from a folder, then transformers."""
        setups = self.asked.setups
        for scheme, head in dict.fromkeys((setup.scheme, setup.int8_head) for setup in setups):
            self.run_scheme([setup for setup in setups if (setup.scheme, setup.int8_head) == (scheme, head)])
            release()
        for scheme in self.asked.load:
            self.load(scheme)
        for baseline in self.asked.baselines:
            self.baseline(baseline)

    def run_scheme(self, setups: Sequence[Setup]) -> None:
        """Engines that share their weights."""
        scheme, begin = setups[0].scheme, time.perf_counter()
        options = self.options(setups[0])
        config = random_config(self.asked.shape)
        backend = choose_backend(options, config)
        source = RandomSource(config, SCHEMES[scheme], backend.dtype, backend.device)
        weights = build_weights(source, backend, limits_of(options, config, backend.device).max_model_len)
        made = time.perf_counter() - begin
        identity = Identity(self.asked.shape, scheme, ())
        for setup in setups:
            engine = engine_of(weights, backend, self.options(setup), identity, None, time.perf_counter())
            self.measure(setup, engine, weights, made)
            del engine
            release()

    def load(self, scheme: str) -> None:
        """Seconds from a folder to a ready engine, twice: as restarts do, the second finds kernels compiled."""
        device = torch.device("cuda" if self.gpu else "cpu")
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            size = write_folder(folder, self.asked.shape, SCHEMES[scheme], device)
            for attempt in ("first", "again"):
                release()
                engine = build_engine(folder, self.options(Setup(scheme, False, False)))
                row = {"bytes": size, "start_s": engine.info.startup_seconds, "attempt": attempt}
                self.write({"setup": scheme, "case": "load"} | row)
                del engine

    def options(self, setup: Setup) -> EngineOptions:
        """What the engine is built with; no two prompts are alike, so there is no prefix to find."""
        asked = self.asked
        return EngineOptions(
            device=asked.device,
            kv_dtype="int8" if setup.int8_kv else "auto",
            max_model_len=asked.max_model_len,
            max_num_seqs=asked.max_num_seqs,
            max_batch_tokens=asked.max_batch_tokens,
            block_size=asked.block_size,
            prefix_caching=False,
            threads=asked.threads,
            int8_head=setup.int8_head,
        )

    def measure(self, setup: Setup, engine: Engine, weights: Weights, made: float) -> None:
        """Every case of one engine."""
        info, prompts = engine.info, Prompts(engine.info.vocab_size)
        token_bytes = info.kv_bytes // info.kv_tokens
        about = {"kernels": info.kernels, "weight_bytes": info.weight_bytes, "kv_tokens": info.kv_tokens}
        about |= {"kv_token_bytes": token_bytes}
        self.write({"setup": setup.name, "case": "build", "weights_s": made, "start_s": info.startup_seconds} | about)
        cases = self.asked.cases
        shapes = [("decode", 1, c) for c in (128, 2048)] + [("batch", s, 1024) for s in (8, 32, 64)]
        for case, sequences, context in shapes:
            if case in cases and sequences <= info.max_num_seqs and context + 256 <= info.max_model_len:
                steps = self.asked.steps
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
                self.write_profile(setup, sequences, context, profile_decode(engine, prompts, sequences, context))
        if self.gpu and engine.info.max_model_len > 2048:
            self.write_profile(setup, 4, 2048, profile_prefill(engine, prompts, 4, 2048), "prefill")

    def write_profile(self, setup: Setup, sequences: int, context: int, found: Profile, what: str = "decode") -> None:
        """A row: the longest kernels and gaps."""
        row: dict[str, Any] = {"setup": setup.name, "case": "profile", "what": what}
        row |= {"sequences": sequences, "context": context, "idle": found.idle, "step_us": found.step_us}
        row["kernels"] = dict(sorted(found.kernels.items(), key=lambda item: -item[1][0])[:16])
        row["gaps"] = dict(sorted(found.gaps.items(), key=lambda item: -item[1])[:12])
        self.write(row)

    def prefill(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Prompt tokens a second."""
        for count, prompt in ((1, 2048), (4, 2048), (1, 8192)):
            if prompt < engine.info.max_model_len:
                rate = time_prefill(engine, prompts, count, prompt)
                row = {"sequences": count, "prompt": prompt, "prompt_tokens_per_second": rate}
                self.write({"setup": setup.name, "case": "prefill"} | row)

    def first_token(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Seconds to the first token of a lone request."""
        for prompt in (32, 128, 1024):
            if prompt < engine.info.max_model_len:
                seconds = time_first_token(engine, prompts, prompt)
                self.write({"setup": setup.name, "case": "ttft", "prompt": prompt, "seconds": seconds})

    def workloads(self, setup: Setup, engine: Engine, prompts: Prompts) -> None:
        """Whole workloads, all requests there at the start."""
        for work in self.asked.workloads:
            time_workload(engine, prompts, min(work.requests, 8), work.prompt, 2)  # kernels are there, memory is warm
            found = time_workload(engine, prompts, work.requests, work.prompt, work.output)
            self.write({"setup": setup.name, "case": "workload"} | asdict(found) | {"output_rate": found.output_rate})

    def baseline(self, name: str) -> None:
        """transformers on the same shapes, bf16."""
        run = {"static": baselines.static_generate, "continuous": baselines.continuous_batching}[name]
        for work in self.asked.baseline_workloads:
            found = run(random_config(self.asked.shape), self.asked.device, work)
            self.write({"setup": f"transformers {name}", "case": "workload"} | found)
        release()


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
            what = f"{row['what']} of {row['sequences']} x {row['context']}"
            lines.append(f"{row['setup']}: {what}: device idle {row['idle']:.1%} of {row['step_us']:.0f} us a step")
        elif kind == "load":
            lines.append(f"{row['setup']}: {row['attempt']} start from a folder: {row['start_s']:.1f} s")
        elif kind == "build":
            lines.append(f"{row['setup']}: weights {row['weights_s']:.1f} s, ready after {row['start_s']:.1f} s more")
    return "\n".join(lines)


def run_offline(options: OfflineOptions) -> list[dict[str, Any]]:
    """Measure; JSON lines go to stdout as they come, one line for each figure to stderr at the end."""
    bench = Bench(options)
    bench.run()
    print(summary(bench.rows), file=sys.stderr)
    return bench.rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The same options as `quantlab bench offline`, where typer is not installed."""
    made = argparse.ArgumentParser(prog="quantlab.bench.offline", description=__doc__)
    for name, default in (("shape", SHAPE_NAMES[0]), ("setups", "bf16,int8,int4,int4+kv8"), ("cases", ",".join(CASES)),
                          ("workloads", WORKLOADS), ("baselines", ""), ("baseline-workloads", "128/128x128"),
                          ("load", ""), ("device", "auto")):  # fmt: skip
        made.add_argument(f"--{name}", default=default)
    for name, number in (("max-model-len", 16384), ("max-num-seqs", None), ("max-batch-tokens", None),
                         ("block-size", None), ("threads", None), ("steps", 48)):  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=number)
    made.add_argument("--out", type=Path)
    given = vars(made.parse_args(arguments))
    given["shape"] = parse_names(given["shape"], SHAPE_NAMES, "--shape")[0]
    given["setups"] = parse_setups(given["setups"])
    given["workloads"] = parse_workloads(given["workloads"], "--workloads")
    given["baseline_workloads"] = parse_workloads(given["baseline_workloads"], "--baseline-workloads")
    for name, known in (("cases", CASES), ("baselines", BASELINES), ("load", SCHEME_NAMES)):
        given[name] = parse_names(given[name], known, f"--{name}")
    run_offline(OfflineOptions(**given))


if __name__ == "__main__":
    main()
