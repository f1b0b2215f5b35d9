"""`quantlab serve`: a checkpoint behind an OpenAI-compatible server.

Knows nothing about how it is served.
"""

import sys
import time
from dataclasses import asdict, replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING

import typer

from quantlab.checkpoint.model_folder import open_model
from quantlab.cli import serve_arguments as arg
from quantlab.cli.console import print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.serve_view import Shown, base_url_of, show_ready
from quantlab.errors import MissingExtra
from quantlab.log import environment, show_requests
from quantlab.runtime.options import EngineInfo, EngineOptions

if TYPE_CHECKING:
    from quantlab.server.options import ServeOptions

EXAMPLES = (
    ("quantlab serve ./Llama-3.2-1B-w4a16", "on http://127.0.0.1:8000, for this machine alone"),
    ("quantlab serve ./Llama-3.2-1B-w4a16 --host 0.0.0.0 --api-key-file keys.txt", "for a network"),
    ("quantlab serve ./Llama-3.2-1B-w4a16 --kv-dtype int8 --max-queue 64", "half the cache memory, a short queue"),
)
app = typer.Typer()


@app.command("serve", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    model: arg.Model,
    host: arg.Host = "127.0.0.1",
    port: arg.Port = 8000,
    served_model_name: arg.Names = None,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
    kv_dtype: arg.KVDtype = "auto",
    kv_memory: arg.KVMemory = None,
    max_model_len: arg.MaxModelLen = None,
    max_num_seqs: arg.MaxNumSeqs = None,
    max_batch_tokens: arg.MaxBatchTokens = None,
    block_size: arg.BlockSize = "auto",
    prefix_caching: arg.PrefixCaching = True,
    policy: arg.PolicyOption = "fcfs",
    cuda_graphs: arg.CudaGraphs = True,
    int8_head: arg.Int8Head = False,
    threads: arg.Threads = None,
    chat_template: arg.ChatTemplate = None,
    hang_seconds: arg.HangSeconds = 300.0,
    max_queue: arg.MaxQueue = 256,
    max_queue_tokens: arg.MaxQueueTokens = 1 << 18,
    drain_seconds: arg.DrainSeconds = 30.0,
    restart_engine: arg.RestartEngine = False,
    api_key_file: arg.ApiKeyFile = None,
    allowed_host: arg.AllowedHost = None,
    log_requests: arg.LogRequests = False,
    as_json: arg.Json = False,
) -> None:
    """Serve a checkpoint to every client that speaks OpenAI's API."""
    begin = time.monotonic()
    require_extra()
    from quantlab.server.admission import QueueLimits
    from quantlab.server.auth import ENVIRONMENT, read_keys
    from quantlab.server.options import ServeOptions

    open_model(model)
    kv = (kv_dtype, kv_memory, None if block_size == "auto" else int(block_size))
    limits = (max_model_len, max_num_seqs, max_batch_tokens)
    engine = EngineOptions(
        device, dtype, *kv, *limits, prefix_caching, policy, cuda_graphs, threads=threads, int8_head=int8_head
    )
    keys = read_keys(api_key_file, environment(ENVIRONMENT))
    options = ServeOptions(
        folder=model,
        names=tuple(served_model_name or [model.resolve().name]),
        engine=engine,
        queue=QueueLimits(max_queue, max_queue_tokens),
        drain_seconds=drain_seconds,
        restart_engine=restart_engine,
        hang_seconds=hang_seconds,
        api_keys=keys,
        allowed_hosts=tuple(allowed_host) if allowed_host else None,
        chat_template=chat_template,
        log_requests=log_requests,
    )
    run(options, (host, port), as_json, begin)


def run(options: "ServeOptions", address: tuple[str, int], as_json: bool, begin: float) -> None:
    """Serve until a signal; what takes long runs side by side: the engine's start, and imports here."""
    from quantlab.server.engine_client import launch
    from quantlab.server.listener import listen

    listener = listen(*address)
    bound: tuple[str, int] = listener.getsockname()[:2]
    options = guarded(options, bound[0])
    launch_engine = partial(launch, options.folder, options.engine)
    started = launch_engine()
    from quantlab.server.lifecycle import serve
    from quantlab.server.service import load_service

    service = load_service(options)
    base_url, keyed, can_chat = base_url_of(bound), bool(options.api_keys), service.strangers.can_chat

    def announce(info: EngineInfo) -> None:
        seconds, name = time.monotonic() - begin, options.names[0]
        if as_json:
            print_json({"base_url": base_url, "name": name, "seconds": seconds, **asdict(info)})
        else:
            show_ready(info, Shown(name, base_url, keyed, can_chat, seconds))
        sys.stdout.flush()

    serve(service, listener, started, launch_engine, announce)


def guarded(options: "ServeOptions", host: str) -> "ServeOptions":
    """`options` made safe for the address that is bound: what is open to this machine alone, and what to warn of."""
    if options.log_requests:
        show_requests()
    if options.api_keys:
        return options
    if not ip_address(host).is_loopback:
        sys.stderr.write("warning: everyone who can reach this machine may use this server; see --api-key-file\n")
        return options
    # A page elsewhere could let its own name point here; with a key, or on a network, that gains it nothing.
    return replace(options, allowed_hosts=options.allowed_hosts or ())


def require_extra() -> None:
    """Raises MissingExtra where the server's packages are not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "msgspec", "prometheus_client", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"quantlab serve needs {', '.join(missing)}", fix="pip install 'quantlab[serve]'")
