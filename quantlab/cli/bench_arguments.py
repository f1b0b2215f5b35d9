"""The options of `quantlab bench`: what each accepts, and the sentence its help shows.

Knows nothing about what is done with them.
"""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.arguments import parse_device

LOAD, WORK, LIMITS, OUTPUT = "Load", "What is asked", "Limits of a good answer", "Output"

BaseUrl = Annotated[
    str, typer.Option("--base-url", metavar="URL", help="The server, http://HOST:PORT/v1.", show_default=True)
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Its model. Default: the first it names.", show_default=False),
]
Chat = Annotated[bool, typer.Option("--chat", help="Ask /v1/chat/completions instead of /v1/completions.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", envvar="QUANTLAB_API_KEY", show_default=False, help="Sent as a bearer token."
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, max=86_400, metavar="SECONDS", help="For one whole answer.")]
Concurrency = Annotated[
    str | None,
    typer.Option(
        "--concurrency",
        metavar="N,N",
        help="Closed loop: so many requests always under way; several are measured one after the other.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(
        "--rate",
        metavar="R,R",
        help="Open loop: so many arrive each second on average, at random times.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
Requests = Annotated[
    int, typer.Option("--requests", "-n", metavar="N", min=1, max=1_000_000, help="At each load.", rich_help_panel=LOAD)
]
Seconds = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        min=0.1,
        max=86_400,
        help="Send no more after so long.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=100_000,
        help="Requests before each load that count nowhere. Default: as many as are under way, at most 16.",
        rich_help_panel=LOAD,
        show_default=False,
    ),
]
Input = Annotated[
    str, typer.Option("--input", metavar="N|LOW:HIGH", help="Prompt tokens, about.", rich_help_panel=WORK)
]
Output = Annotated[str, typer.Option("--output", metavar="N|LOW:HIGH", help="Output tokens.", rich_help_panel=WORK)]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Ask these instead: .jsonl with prompt or messages and max_tokens, or a prompt a line.",
        rich_help_panel=WORK,
        show_default=False,
    ),
]
SharedPrefix = Annotated[
    int,
    typer.Option(
        "--shared-prefix", metavar="N", min=0, help="Prompt tokens that all requests share.", rich_help_panel=WORK
    ),
]
Temperature = Annotated[float, typer.Option(metavar="T", min=0, max=2, rich_help_panel=WORK, help="0 is greedy.")]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos/--honour-eos",
        help="Whether answers run to their full length; not every server knows this.",
        rich_help_panel=WORK,
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**31 - 1, help="Of prompts and arrivals.", rich_help_panel=WORK)
]
Ttft = Annotated[
    float | None,
    typer.Option("--ttft", min=0, metavar="MS", help="To the first token.", rich_help_panel=LIMITS, show_default=False),
]
Tpot = Annotated[
    float | None,
    typer.Option(
        "--tpot", min=0, metavar="MS", help="For each further token.", rich_help_panel=LIMITS, show_default=False
    ),
]
E2e = Annotated[
    float | None,
    typer.Option("--e2e", min=0, metavar="MS", help="For a whole answer.", rich_help_panel=LIMITS, show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Folder for load.json and load.html.",
        rich_help_panel=OUTPUT,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=OUTPUT)]
Only = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="A,B",
        help="w4a16, w8a8, load, attention, fused, layer; all unless given.",
        show_default=False,
    ),
]
Tune = Annotated[bool, typer.Option("--tune", help="Measure tiles first and write the data files of the package.")]
Dense = Annotated[bool, typer.Option("--dense", help="Many more numbers of tokens where that is asked for.")]
Rows = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Append a JSON line a row to this file.", show_default=False),
]
Shape = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="llama-3.1-8b, llama-3.2-1b, qwen3-0.6b, llama-500m or tiny.",
        show_default=True,
    ),
]
Setups = Annotated[
    str,
    typer.Option(
        "--setups",
        metavar="A,B",
        help="bf16, int8, int4 or int8-weights, with +kv8 and +head8 behind it. Default: bf16,int8,int4,int4+kv8",
        show_default=False,
    ),
]
Cases = Annotated[
    str,
    typer.Option(
        "--cases",
        metavar="A,B",
        help="decode, batch, prefill, ttft, profile, workload; all unless given.",
        show_default=False,
    ),
]
Workloads = Annotated[
    str,
    typer.Option(
        "--workloads",
        metavar="P/OxN,...",
        help="Prompt / output tokens x requests, all at once. Default: 128/128x1024, 1000/1000x256 and 128/2048x256.",
        show_default=False,
    ),
]
Baselines = Annotated[
    str,
    typer.Option("--baselines", metavar="A,B", help="transformers as well: static, continuous.", show_default=False),
]
BaselineWorkloads = Annotated[
    str, typer.Option("--baseline-workloads", metavar="P/OxN,...", help="What transformers is given.")
]
Load = Annotated[
    str, typer.Option("--load", metavar="A,B", help="Schemes whose start from a folder is timed.", show_default=False)
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="auto|cpu|cuda[:N]", parser=parse_device, help="Where to compute."),
]
MaxModelLen = Annotated[int, typer.Option("--max-model-len", min=16, metavar="TOKENS", help="The longest sequence.")]
MaxNumSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", metavar="N", min=1, help="Sequences at a time.", show_default=False)
]
MaxBatchTokens = Annotated[
    int | None, typer.Option("--max-batch-tokens", metavar="N", min=1, help="Tokens a step.", show_default=False)
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", metavar="N", min=16, help="Tokens in a block of the KV cache.", show_default=False),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="Of the CPU.", show_default=False)]
Steps = Annotated[
    int, typer.Option("--steps", metavar="N", min=1, max=100_000, help="Decode steps whose median is taken.")
]
