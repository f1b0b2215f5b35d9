"""The options of `quantlab quantize`: what each accepts, and the sentence its help shows.

Knows nothing about what is done with them. Parsers raise typer.BadParameter, which becomes one line.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from quantlab.quant.options import DEFAULT_SAMPLES

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
MIN_SHARD = 10**6
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
RECIPE, TEXT, RUN, OUTPUT = "What to make", "Calibration text", "The run", "Output"


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number; raises typer.BadParameter."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise typer.BadParameter(f"'{text}' is not a size such as 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if not MIN_SHARD <= size <= 10**15:
        raise typer.BadParameter(f"'{text}' is not between 1MB and 1000TB")
    return size


def parse_samples(text: str) -> int:
    """A number of blocks, or 0 for `all`; raises typer.BadParameter."""
    if text == "all":
        return 0
    if not re.fullmatch(r"\d{1,7}", text) or int(text) == 0:
        raise typer.BadParameter(f"'{text}' is neither a number of blocks from 1 nor 'all'")
    return int(text)


def parse_device(text: str) -> str:
    """A device name; raises typer.BadParameter."""
    if not DEVICE.fullmatch(text):
        raise typer.BadParameter(f"'{text}' is neither auto, cpu, cuda nor one GPU such as cuda:0")
    return text


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="Folder of a 16-bit Hugging Face checkpoint.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder to make; must not exist.", show_default=False, rich_help_panel=OUTPUT),
]
SchemeOption = Annotated[
    Literal["w4a16", "w8a8", "w8a16"] | None,
    typer.Option(
        help="Weights and activations: INT4, INT8 both, or INT8 weights only. Default: w4a16.", rich_help_panel=RECIPE
    ),
]
QualityOption = Annotated[
    Literal["fast", "balanced", "best"] | None,
    typer.Option(
        help="fast: one forward pass. balanced: Hessians, no gradients. best: learns; wants a GPU. Default: balanced.",
        rich_help_panel=RECIPE,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="A recipe file, or a built-in name, instead of --scheme and --quality.",
        rich_help_panel=RECIPE,
    ),
]
GroupSizeOption = Annotated[
    Literal["32", "64", "128", "channel"] | None,
    typer.Option(help="Weights that share one scale; the recipe's if not given.", rich_help_panel=RECIPE),
]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="Without or with zero points (INT4 only).", rich_help_panel=RECIPE),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|ID",
        help="Text, jsonl or parquet file, a folder of them, or a dataset id; bundled text if not given.",
        rich_help_panel=TEXT,
    ),
]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="Split of a dataset.", rich_help_panel=TEXT)]
Field = Annotated[
    str | None, typer.Option(metavar="NAME", help="Field that holds the text or messages.", rich_help_panel=TEXT)
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N|all",
        parser=parse_samples,
        help=f"Blocks of text to calibrate on. Default: {DEFAULT_SAMPLES}, all for best.",
        rich_help_panel=TEXT,
    ),
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=16,
        max=1 << 20,
        help="Tokens in a block. Default: 1024, or the model's limit.",
        rich_help_panel=TEXT,
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**31 - 1, help="Chooses the blocks.", rich_help_panel=TEXT)]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda[:N]", parser=parse_device, help="Where to compute.", rich_help_panel=RUN)
]
MaxShardSize = Annotated[
    int,
    typer.Option(metavar="SIZE", parser=parse_size, help="Largest weight file.", rich_help_panel=OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing checkpoint folder.", rich_help_panel=OUTPUT)]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew instead of resuming.", rich_help_panel=RUN)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show sizes, memory, time and problems; compute nothing.", rich_help_panel=RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=OUTPUT)]
