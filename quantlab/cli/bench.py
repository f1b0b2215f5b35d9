"""`quantlab bench`: what a server, the engine or the kernels give on this machine.

Knows nothing about how anything is measured.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantlab.cli import bench_arguments as arg
from quantlab.cli.console import data_console, print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.failures import Interrupted
from quantlab.cli.preflight import check_folder

if TYPE_CHECKING:
    from quantlab.bench.serve_options import LoadOptions
    from quantlab.bench.serve_result import LoadResult
    from quantlab.bench.serve_summary import LevelResult

URL = "http://127.0.0.1:8000/v1"
SERVE_EXAMPLES = (
    ("quantlab bench serve --concurrency 1,8,32 --out ./load", "a server on this machine, three loads, a page"),
    (
        "quantlab bench serve --rate 4 --seconds 60 --ttft 500 --tpot 50",
        "four a second, and how many were good",
    ),
    ("quantlab bench serve --concurrency 16 --shared-prefix 1000 --input 1100", "what the prefix cache gives"),
)
OFFLINE_EXAMPLES = (
    ("quantlab bench offline --shape llama-500m --device cpu --max-model-len 2048 --workloads 128/64x16", "on a CPU"),
    (
        "quantlab bench offline --setups int4+kv8 --baselines static,continuous",
        "an 8B model on a GPU, transformers too",
    ),
)
KERNEL_EXAMPLES = (
    ("quantlab bench kernels --out rows.jsonl", "every kernel on this GPU, a JSON line a row"),
    ("quantlab bench kernels --only w4a16 --tune", "measure tiles for this GPU first, and keep the fastest"),
)
EXAMPLES = SERVE_EXAMPLES
app = typer.Typer(context_settings=SETTINGS, epilog=epilog(EXAMPLES))


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure a server under load, the engine alone, or the kernels on this GPU."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("serve", context_settings=SETTINGS, epilog=epilog(SERVE_EXAMPLES))
def serve(
    base_url: arg.BaseUrl = URL,
    model: arg.Model = None,
    chat: arg.Chat = False,
    api_key: arg.ApiKey = None,
    timeout: arg.Timeout = 600.0,
    concurrency: arg.Concurrency = None,
    rate: arg.Rate = None,
    requests: arg.Requests = 200,
    seconds: arg.Seconds = None,
    warmup: arg.Warmup = None,
    input: arg.Input = "128",
    output: arg.Output = "128",
    prompts: arg.Prompts = None,
    shared_prefix: arg.SharedPrefix = 0,
    temperature: arg.Temperature = 0.0,
    ignore_eos: arg.IgnoreEos = True,
    seed: arg.Seed = 0,
    ttft: arg.Ttft = None,
    tpot: arg.Tpot = None,
    e2e: arg.E2e = None,
    out: arg.Out = None,
    json: arg.Json = False,
) -> None:
    """Load any OpenAI-compatible server and measure what its users would see: latencies, throughput, failures.

    Times count from the moment a request was due. Exits with 13 if the server cannot be reached or answers nothing.
    """
    from quantlab.bench.serve_options import Limits, LoadOptions, Span, Target, Work, parse_levels

    target = Target(base_url, model, "chat" if chat else "completions", api_key, timeout)
    lengths = Span.parse(input, "--input"), Span.parse(output, "--output")
    work = Work(*lengths, prompts, shared_prefix, temperature, ignore_eos, seed)
    limits = Limits(*(None if limit is None else limit / 1000 for limit in (ttft, tpot, e2e)))
    levels = parse_levels(concurrency, rate)
    if out is not None:
        check_folder(out)
    measure(LoadOptions(target, levels, work, limits, requests, seconds, warmup), out, json)


@app.command("offline", context_settings=SETTINGS, epilog=epilog(OFFLINE_EXAMPLES))
def offline(
    shape: arg.Shape = "llama-3.1-8b",
    setups: arg.Setups = "bf16,int8,int4,int4+kv8",
    cases: arg.Cases = "decode,batch,prefill,ttft,profile,workload",
    workloads: arg.Workloads = "128/128x1024,1000/1000x256,128/2048x256",
    baselines: arg.Baselines = "",
    baseline_workloads: arg.BaselineWorkloads = "128/128x128",
    load: arg.Load = "",
    device: arg.Device = "auto",
    max_model_len: arg.MaxModelLen = 16384,
    max_num_seqs: arg.MaxNumSeqs = None,
    max_batch_tokens: arg.MaxBatchTokens = None,
    block_size: arg.BlockSize = None,
    threads: arg.Threads = None,
    steps: arg.Steps = 48,
    out: arg.Rows = None,
) -> None:
    """Measure the engine alone, on random weights of known shapes: decode steps, prompts, first tokens, workloads.

    JSON lines go to stdout as they come, one line for each figure to stderr at the end.
    """
    from quantlab.bench import offline_options as read

    options = read.OfflineOptions(
        shape=read.parse_names(shape, read.SHAPE_NAMES, "--shape")[0],
        setups=read.parse_setups(setups),
        cases=read.parse_names(cases, read.CASES, "--cases"),
        workloads=read.parse_workloads(workloads, "--workloads"),
        baselines=read.parse_names(baselines, read.BASELINES, "--baselines"),
        baseline_workloads=read.parse_workloads(baseline_workloads, "--baseline-workloads"),
        load=read.parse_names(load, read.SCHEME_NAMES, "--load"),
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        block_size=block_size,
        threads=threads,
        steps=steps,
        out=out,
    )
    from quantlab.bench.offline import run_offline

    run_offline(options)


@app.command("kernels", context_settings=SETTINGS, epilog=epilog(KERNEL_EXAMPLES))
def kernels(only: arg.Only = None, tune: arg.Tune = False, dense: arg.Dense = False, out: arg.Rows = None) -> None:
    """Time every GPU kernel on this machine against its baselines and floors, its error beside it.

    Tables go to stdout, JSON lines to --out or stderr. Exits with 3 where there is no CUDA GPU.
    """
    from quantlab.bench.kernels import BENCHES, run
    from quantlab.errors import MissingExtra, UsageError

    names = tuple(BENCHES) if only is None else tuple(name.strip() for name in only.split(","))
    for name in names:
        if name not in BENCHES:
            raise UsageError(f"no bench is called {name!r}", where="--only", fix=f"one of {', '.join(BENCHES)}")
    import torch

    if not torch.cuda.is_available():
        raise MissingExtra(
            "no CUDA GPU", where="quantlab bench kernels", fix="run it where `quantlab doctor` shows one"
        )
    run(names, tune, out, dense)


def measure(options: "LoadOptions", out: Path | None, json: bool) -> None:
    """Put the load on the server, show the figures, write the files."""
    from quantlab.bench.serve import run_load
    from quantlab.bench.serve_page import load_page
    from quantlab.eval.reports.files import write_file

    try:
        result = run_load(options, tell)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was written", where=options.target.base_url) from None
    contents = {"load.json": result.to_json() + "\n", "load.html": load_page(result)} if out is not None else {}
    written = [write_file(out / name, content.encode()) for name, content in contents.items()] if out else []
    if json:
        print_json(result.as_json())
        return
    show(result)
    for path in written:
        data_console().print(f"written  {path}", markup=False)


def tell(level: "LevelResult") -> None:
    """One line on stderr when a level has ended."""
    from quantlab.bench.serve_table import rate, seconds

    failed = level.sent - level.succeeded
    lost = f", {failed} failed" if failed else ""
    told = f"{level.name}: {rate(level.output_rate)} tokens/s, first token {seconds(level.ttft.p50)}{lost}"
    sys.stderr.write(f"{told}\n")


def show(result: "LoadResult") -> None:
    """The tables on stdout."""
    from quantlab.bench.serve_table import failure_table, length_table, load_table
    from quantlab.eval.reports.terminal import drawn

    console = data_console()
    for table in (load_table(result), length_table(result), failure_table(result)):
        if table is not None:
            console.print(drawn(table))
            console.print()
