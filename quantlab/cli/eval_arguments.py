"""The options of `quantlab eval`: what each accepts, and the sentence its help shows.

Knows nothing about what is done with them. Parsers raise typer.BadParameter, which becomes one line.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from quantlab.eval.options import DEFAULT_WINDOW, MIN_WINDOW

TEXT, TASKS, VERDICT, RUN, OUTPUT = "Text", "Tasks", "Verdict", "The run", "Output"

Candidate = Annotated[
    Path,
    typer.Argument(metavar="CANDIDATE", help="Folder of the model to judge, 16-bit or packed.", show_default=False),
]
Baseline = Annotated[
    Path,
    typer.Option("--baseline", "-b", metavar="MODEL", help="Folder of the model it stands for.", show_default=False),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE|DIR",
        help="Text to score, UTF-8; may be repeated. A folder's files make one text. Bundled text if not given.",
        rich_help_panel=TEXT,
    ),
]
Protocol = Annotated[
    Literal["gptq", "rolling", "both"],
    typer.Option(help="gptq: disjoint windows. rolling: lm-eval's, with word perplexity.", rich_help_panel=TEXT),
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=MIN_WINDOW,
        max=1 << 20,
        help=f"Tokens in a window. Default: {DEFAULT_WINDOW}, or the models' limit.",
        rich_help_panel=TEXT,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=MIN_WINDOW, help="Use only so many tokens of each text.", rich_help_panel=TEXT),
]
Suite = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A bundled suite (quick, core) or a YAML file.", rich_help_panel=TASKS),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Tasks: bundled, lm-eval's own, or YAML files.", rich_help_panel=TASKS),
]
TaskDir = Annotated[
    Path | None,
    typer.Option("--task-dir", metavar="DIR", help="Folder of the tasks' JSONL data or files.", rich_help_panel=TASKS),
]
Limit = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Only the first items of each task.", rich_help_panel=TASKS),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-task-code", help="Let task files run the Python they name.", rich_help_panel=TASKS),
]
GateOption = Annotated[
    str,
    typer.Option(
        "--gate",
        metavar="FILE|NAME",
        help="What the candidate must prove: a gate file or name.",
        rich_help_panel=VERDICT,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Folder for report.json, report.html, junit.xml and summary.md.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(
        metavar="DTYPE",
        help="auto, bfloat16, float16 or float32: of the activations. auto: the baseline's, where the device is fast "
        "at it.",
        rich_help_panel=RUN,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, max=1024, help="Windows in one forward pass. Default: 1, on a GPU 8.", rich_help_panel=RUN
    ),
]
Served = Annotated[
    bool,
    typer.Option(
        "--served",
        help="Run the candidate as `quantlab serve` does, through its kernels and cache.",
        rich_help_panel=RUN,
    ),
]
KVDtypeOption = Annotated[
    Literal["auto", "int8"],
    typer.Option("--kv-dtype", help="With --served: keys and values in INT8, to see its cost.", rich_help_panel=RUN),
]
Int8Head = Annotated[
    bool,
    typer.Option("--int8-head", help="With --served, on a GPU: the output layer in INT8.", rich_help_panel=RUN),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Where the baseline's results are kept. Default: ~/.cache/quantlab/eval.",
        rich_help_panel=RUN,
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Run the baseline anew, keep nothing.", rich_help_panel=RUN)]
