"""The options of every command that starts an engine: what each accepts, and the sentence its help shows.

Knows nothing about what is done with them.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from quantlab.cli.arguments import parse_device, parse_size

ENGINE = "The engine"

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A checkpoint folder, 16-bit or packed.", show_default=False)
]
Device = Annotated[
    str,
    typer.Option(metavar="auto|cpu|cuda[:N]", parser=parse_device, help="Where to compute.", rich_help_panel=ENGINE),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        metavar="DTYPE",
        help="auto, float32, bfloat16 or float16: of activations; auto: the checkpoint's.",
        rich_help_panel=ENGINE,
    ),
]
KVDtype = Annotated[
    Literal["auto", "int8"],
    typer.Option("--kv-dtype", help="Of keys and values; int8 takes half the memory.", rich_help_panel=ENGINE),
]
KVMemory = Annotated[
    int | None,
    typer.Option(
        "--kv-memory",
        metavar="SIZE",
        parser=parse_size,
        help="For keys and values, such as 2GB. Default: a share of what is free.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1 << 24,
        metavar="TOKENS",
        help="Longest prompt and answer together. Default: the model's length, or what fits.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="Requests worked on at once.", rich_help_panel=ENGINE, show_default=False),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(min=1, max=1 << 20, help="Tokens computed in a step.", rich_help_panel=ENGINE, show_default=False),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Keep what is computed for prompts that begin alike.",
        rich_help_panel=ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=1024,
        help="Of the CPU. Default: torch's own.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
