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
    replaces the folder's own. `restart_engine`: start another engine when one dies, instead of ending."""

    folder: Path
    names: tuple[str, ...]
    engine: EngineOptions
    queue: QueueLimits
    drain_seconds: float = 30.0
    restart_engine: bool = False
    api_keys: tuple[str, ...] = ()
    chat_template: Path | None = None
    log_requests: bool = False
