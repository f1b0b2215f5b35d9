"""`quantlab generate`: a prompt in, text out as it comes.

Knows nothing about models; torch is imported only when what can be checked without it has been.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantlab.checkpoint.model_folder import open_model
from quantlab.cli import engine_arguments as engine
from quantlab.cli.console import print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.preflight import check_device
from quantlab.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from quantlab.llm import Completion, Piece

EXAMPLES = (
    ("quantlab generate ./Llama-3.2-1B-w4a16 --prompt 'It was a dark and'", "a continuation, as it is written"),
    ("quantlab generate ./Llama-3.2-1B --prompt Once -n 20 --temperature 0 --json", "the likeliest, for a script"),
    ("quantlab generate ./Llama-3.2-1B --prompt-file notes.txt --seed 7 --stop '.'", "the same text every time"),
)
SAMPLING = "How to choose"
LARGEST_FILE = 1 << 24
Temperature = Annotated[
    float, typer.Option(metavar="T", min=0, max=100, help="0: always the likeliest token.", rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float,
    typer.Option(metavar="P", min=1e-6, max=1, help="The likeliest tokens of this share.", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=1 << 24, help="The so many likeliest tokens; 0: all.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, max=2**63 - 1, help="Same seed, same text.", rich_help_panel=SAMPLING, show_default=False
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Ends the text; may be given again.", rich_help_panel=SAMPLING),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on where the model would end.", rich_help_panel=SAMPLING)
]
app = typer.Typer()


@app.command("generate", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    model: engine.Folder,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; may be given again.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to continue; - is standard input.", show_default=False)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's message, in the model's chat template.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, max=1 << 24, help="At most so many.")
    ] = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    device: engine.Device = "auto",
    dtype: engine.Dtype = "auto",
    kv_dtype: engine.KVDtype = "auto",
    kv_memory: engine.KVMemory = None,
    max_model_len: engine.MaxModelLen = None,
    threads: engine.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
) -> None:
    """Continue a prompt, streaming the text to the terminal; several prompts are worked on together.

    Text goes to standard output, a line about speed to standard error.
    """
    prompts = read_prompts(prompt or [], prompt_file)
    if stop and not all(stop):
        raise UsageError("is empty", where="--stop", fix="leave it out, or say what ends the text")
    check_device(device)
    open_model(model)
    from quantlab.llm import LLM
    from quantlab.runtime.options import EngineOptions
    from quantlab.runtime.request import SamplingParams

    options = EngineOptions(device, dtype, kv_dtype, kv_memory, max_model_len=max_model_len, threads=threads)
    params = SamplingParams(
        max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, ignore_eos=ignore_eos
    )
    llm = LLM(model, options)
    asked = [llm.chat_prompt([{"role": "user", "content": text}]) for text in prompts] if chat else prompts
    show(llm.stream(asked, params, tuple(stop or ())), prompts, json)


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts to continue, in order; raises UsageError when there is none, or one that is no text."""
    prompts = given + ([read_text(file)] if file is not None else [])
    if not prompts:
        raise UsageError("nothing to continue", where="--prompt", fix="--prompt TEXT, or --prompt-file FILE")
    if not all(prompts):
        raise UsageError("an empty prompt cannot be continued", where="--prompt")
    return prompts


def read_text(file: Path) -> str:
    """The text in `file`, or of standard input for -."""
    try:
        if str(file) == "-":
            data = sys.stdin.buffer.read(LARGEST_FILE + 1)
        else:
            with open(file, "rb") as source:
                data = source.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise UsageError(f"more than {LARGEST_FILE >> 20} MiB of prompt", where=str(file))
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"cannot be read: {reason}", where=str(file)) from error


def show(pieces: "Iterator[Piece]", prompts: list[str], as_json: bool) -> None:
    """Write the text of one prompt as it comes, of several each when it is whole, and how fast it was."""
    terminal, live = sys.stdout.isatty(), len(prompts) == 1 and not as_json
    started, first = time.perf_counter(), None
    done: dict[int, Completion] = {}
    for piece in pieces:
        first = first or time.perf_counter()
        if live:
            write(piece.text, terminal)
        if piece.completion is not None:
            done[piece.index] = piece.completion
            if piece.completion.error:
                raise NumericsError(piece.completion.error)
    seconds = time.perf_counter() - started
    for index, text in enumerate(prompts):
        if as_json:
            print_json(as_dict(text, done[index]))
        elif not live:
            write(f"--- {text}\n{done[index].text}\n", terminal)
    if not as_json:
        sys.stdout.write("\n" if live else "")
        sys.stderr.write(summary(list(done.values()), seconds, (first or started) - started) + "\n")


def write(text: str, terminal: bool) -> None:
    """`text` to standard output at once; a terminal gets none of a model's control characters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text) if terminal else text
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(shown.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def as_dict(prompt: str, found: "Completion") -> dict[str, Any]:
    """A completion as plain values."""
    return {
        "prompt": prompt,
        "text": found.text,
        "token_ids": list(found.token_ids),
        "finish_reason": found.finish_reason,
        "stop": found.stop,
        "prompt_tokens": len(found.prompt_ids),
        "completion_tokens": len(found.token_ids),
    }


def summary(done: "list[Completion]", seconds: float, first: float) -> str:
    """How many tokens, how fast, why it ended."""
    read, written = (sum(map(len, ids)) for ids in zip(*((c.prompt_ids, c.token_ids) for c in done), strict=True))
    reasons = ", ".join(sorted({c.finish_reason for c in done}))
    speed = f"{written / seconds:.1f} tokens/s, the first text after {1e3 * first:.0f} ms"
    return f"{read} prompt tokens, {written} tokens written, {speed}; ended by {reasons}"
