"""A server in a process of its own, over the scripted engine: `running.py FOLDER OPTIONS-AS-JSON`.

Prints one line of JSON when it is ready. The options are fields of ServeOptions and EngineOptions, and `pace`, the
seconds of one step.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quantlab.errors import QuantlabError
from quantlab.log import configure
from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.server.admission import QueueLimits
from quantlab.server.engine_client import EngineProcess, launch
from quantlab.server.lifecycle import serve
from quantlab.server.listener import listen
from quantlab.server.options import ServeOptions
from quantlab.server.service import load_service

SCRIPT = str(Path(__file__).with_name("scripted_engine.py"))


def launcher(
    pace: float, folder: Path = Path("somewhere"), options: EngineOptions | None = None
) -> Callable[[], EngineProcess]:
    """Starts scripted engines."""
    return partial(launch, folder, options or EngineOptions(), (sys.executable, SCRIPT, str(pace)))


def options_of(folder: Path, given: dict[str, Any]) -> ServeOptions:
    rest = dict(given)
    engine = EngineOptions(**rest.pop("engine", {}))
    queue = QueueLimits(rest.pop("max_queue", 256), rest.pop("max_queue_tokens", 1 << 18))
    keys = tuple(rest.pop("api_keys", ()))
    template = Path(rest.pop("chat_template")) if "chat_template" in rest else None
    if "allowed_hosts" in rest:
        rest["allowed_hosts"] = tuple(rest["allowed_hosts"])
    return ServeOptions(folder, (folder.name,), engine, queue, api_keys=keys, chat_template=template, **rest)


def main(folder: Path, given: dict[str, Any]) -> int:
    pace = given.pop("pace", 0.0)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    service = load_service(options_of(folder, given))
    start = launcher(pace, folder, service.options.engine)

    def announce(info: EngineInfo) -> None:
        assert service.engine is not None
        ready = {"base_url": f"http://127.0.0.1:{port}", "engine_pid": service.engine.process.pid}
        print(json.dumps(ready), flush=True)

    try:
        serve(service, listener, start(), start, announce)
    except QuantlabError as error:
        sys.stderr.write(f"error: {error.one_line()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    configure(debug=False)
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
