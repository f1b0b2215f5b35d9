"""How a server is to run, as plain values.

Knows nothing about the command line or HTTP.
"""

from dataclasses import dataclass
from pathlib import Path

from quantlab.runtime.options import EngineOptions
from quantlab.server.admission import QueueLimits


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """`names` are those that clients may call the model by, the first is shown. `chat_template` is a file that
    replaces the folder's own. `restart_engine`: start another engine when one dies, instead of ending. An engine that
    has work and says nothing for `hang_seconds` is taken for dead. `allowed_hosts`: names beside this machine's own
    that the server may be asked by; None is any."""

    folder: Path
    names: tuple[str, ...]
    engine: EngineOptions
    queue: QueueLimits
    drain_seconds: float = 30.0
    restart_engine: bool = False
    hang_seconds: float = 300.0
    api_keys: tuple[str, ...] = ()
    chat_template: Path | None = None
    allowed_hosts: tuple[str, ...] | None = None
    log_requests: bool = False
