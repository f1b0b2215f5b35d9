"""The options of `quantlab serve`: what each accepts, and the sentence its help shows.

Knows nothing about what is done with them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from quantlab.cli.arguments import parse_device, parse_size

ADDRESS, MODEL, QUEUE, SAFETY = "Address", "The engine", "Queue and ending", "Who may ask"
# Apart from the engine's other options: their second names would leave the help of those no room on a terminal.
SWITCHES = "How the engine works"
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a packed or 16-bit checkpoint.", show_default=False)
]
Host = Annotated[
    str, typer.Option(metavar="NAME", help="Where to listen; 0.0.0.0 is every network.", rich_help_panel=ADDRESS)
]
Port = Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 picks a free one.", rich_help_panel=ADDRESS)]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        metavar="NAME",
        help="What clients call the model; may be given again. Default: the folder's name.",
        show_default=False,
        rich_help_panel=ADDRESS,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda[:N]", parser=parse_device, help="Where to run.", rich_help_panel=MODEL)
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16: of activations and of weights that are not packed.",
        rich_help_panel=MODEL,
    ),
]
KVDtype = Annotated[Literal["auto", "int8"], typer.Option(help="How keys and values are kept.", rich_help_panel=MODEL)]
KVMemory = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE", parser=parse_size, help="For keys and values. Default: what is free.", rich_help_panel=MODEL
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=16,
        max=1 << 24,
        help="Longest sequence. Default: the model's, or what fits.",
        rich_help_panel=MODEL,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=4096, help="Most sequences that run at once.", rich_help_panel=MODEL),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=16, max=1 << 20, help="Most tokens in one step.", rich_help_panel=MODEL),
]
BlockSize = Annotated[
    Literal["auto", "16", "32", "64", "128"],
    typer.Option(help="Tokens in a block of the KV cache; auto: 16 on a CPU, 128 on a GPU.", rich_help_panel=MODEL),
]
PrefixCaching = Annotated[
    bool,
    typer.Option("--prefix-caching/--no-prefix-caching", help="Keep prompts' beginnings.", rich_help_panel=SWITCHES),
]
PolicyOption = Annotated[
    Literal["fcfs", "priority"],
    typer.Option("--policy", help="Who goes first: who came first, or the request's priority.", rich_help_panel=MODEL),
]
Int8Head = Annotated[
    bool,
    typer.Option(
        "--int8-head",
        help="On a GPU, round a 16-bit output layer to INT8: faster for few requests, not quite the file's model.",
        rich_help_panel=SWITCHES,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="Replay decode steps on a GPU.", rich_help_panel=SWITCHES),
]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, max=1024, help="Of the CPU.", rich_help_panel=MODEL)]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Instead of the folder's own chat template.", rich_help_panel=MODEL),
]
MaxQueue = Annotated[
    int,
    typer.Option(metavar="N", min=1, max=1 << 20, help="Most sequences that wait; then 429.", rich_help_panel=QUEUE),
]
MaxQueueTokens = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, max=1 << 30, help="Most prompt tokens that wait; then 429.", rich_help_panel=QUEUE
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=0, max=86400, help="For what is under way, after SIGTERM.", rich_help_panel=QUEUE
    ),
]
RestartEngine = Annotated[
    bool,
    typer.Option("--restart-engine", help="Start another when it dies.", rich_help_panel=QUEUE),
]
HangSeconds = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=1, max=86400, help="Silence after which a busy engine is dead.", rich_help_panel=QUEUE
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keys, one a line; also QUANTLAB_API_KEYS=A,B.", rich_help_panel=SAFETY),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A name in the Host header to answer to; loopback without a key answers to its own alone.",
        show_default=False,
        rich_help_panel=SAFETY,
    ),
]
LogRequests = Annotated[
    bool, typer.Option("--log-requests", help="A line a request on stderr, with its prompt.", rich_help_panel=SAFETY)
]
Json = Annotated[bool, typer.Option("--json", help="Print what is served as one JSON object.", rich_help_panel=ADDRESS)]
