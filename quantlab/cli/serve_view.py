"""What `quantlab serve` shows when it is ready: one screen that says what is served and how to ask.

Knows nothing about how it is served.
"""

import json
import shlex
from dataclasses import dataclass

from rich.markup import escape

from quantlab.cli.console import data_console, plain_table
from quantlab.runtime.options import EngineInfo
from quantlab.units import human_bytes, human_count, human_seconds

ENDPOINTS = (
    "/v1/completions /v1/chat/completions /v1/models /tokenize /detokenize",
    "/health /ready /metrics /version /openapi.json, a page at /",
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the screen says beside the engine: how the server is asked, and the seconds until it was ready."""

    name: str
    base_url: str
    keyed: bool
    can_chat: bool
    seconds: float


def show_ready(info: EngineInfo, shown: Shown) -> None:
    """The screen, on stdout."""
    table = plain_table(header=False)
    weights = f"{info.scheme}, {human_bytes(info.weight_bytes)} of weights"
    length = f"{human_count(info.kv_tokens)} tokens in {info.num_blocks} blocks of {info.block_size}"
    rows = [
        ("model", f"{shown.name}: {info.architecture}, {weights}"),
        ("device", f"{info.device}, {info.dtype}"),
        *(("kernels" if number == 0 else "", kernel) for number, kernel in enumerate(info.kernels)),
        ("KV cache", f"{human_bytes(info.kv_bytes)} {info.kv_dtype}: {length}"),
        ("", f"{info.concurrent_at_max_len:.1f} requests of {info.max_model_len} tokens at once"),
        ("limits", f"{info.max_num_seqs} sequences and {info.max_batch_tokens} tokens a step"),
        ("endpoints", ENDPOINTS[0]),
        ("", ENDPOINTS[1]),
        *([] if shown.can_chat else [("chat", "no: the folder has no chat template; see --chat-template")]),
        (
            "ready",
            f"after {human_seconds(shown.seconds)} at {shown.base_url}" + (", with a key" if shown.keyed else ""),
        ),
    ]
    for label, text in rows:
        table.add_row(label, escape(text))
    console = data_console()
    console.print(table)
    console.print(f"\n{escape(curl(shown.name, shown.base_url, shown.keyed))}", soft_wrap=True)


def curl(name: str, base_url: str, keyed: bool) -> str:
    """A command that asks the server something."""
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 32})
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl {base_url}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def base_url_of(address: tuple[str, int]) -> str:
    """The URL of a bound address, one that this machine can ask."""
    host, port = address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
