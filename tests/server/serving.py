"""Starts servers over the scripted engine for tests, and asks them over HTTP."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from quantlab.errors import QuantlabError
from quantlab.runtime.options import EngineInfo
from quantlab.server.lifecycle import Lifecycle
from quantlab.server.listener import listen
from quantlab.server.service import load_service
from tests.server.running import launcher, options_of

RUNNING = Path(__file__).with_name("running.py")
START_SECONDS = 60.0


class Asking:
    """What a test does with a server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"quantlab:{name}{{"))

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for `condition`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.02)


class Server(Asking):
    """A server on a thread of this process, its engine in a process; `stop` is what SIGTERM does to a real one."""

    def __init__(self, folder: Path, options: dict[str, Any], wait: bool = True) -> None:
        self.error: QuantlabError | None = None
        self._options = dict(options)
        self._pace = self._options.pop("pace", 0.0)
        self._ready = threading.Event()
        self._listener = listen("127.0.0.1", 0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(folder)))
        self._thread.start()
        assert not wait or (self._ready.wait(START_SECONDS) and self.error is None), self.error
        super().__init__(f"http://127.0.0.1:{self._listener.getsockname()[1]}")

    async def _run(self, folder: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self.service = load_service(options_of(folder, self._options))
        start = launcher(self._pace, folder, self.service.options.engine)
        self._lifecycle = Lifecycle(self.service, start, self._announce)
        try:
            await self._lifecycle.run(self._listener, start())
        except QuantlabError as error:
            self.error = error
        finally:
            self._ready.set()

    def _announce(self, info: EngineInfo) -> None:
        self._ready.set()

    @property
    def engine_pid(self) -> int:
        assert self.service.engine is not None
        return self.service.engine.process.pid

    def stop(self) -> None:
        """Begin to drain."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._lifecycle.stop)

    def wait(self, seconds: float = 20.0) -> QuantlabError | None:
        """What ended the server, None for `stop`."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the server goes on"
        self.http.close()
        return self.error


class RealServer(Asking):
    """A server in a process of its own; `engine_pid` is its engine's."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        command = [sys.executable, "-W", "error", str(RUNNING), str(folder), json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1])
        ready = json.loads(line)
        self.engine_pid: int = ready["engine_pid"]
        super().__init__(ready["base_url"])

    def wait(self, seconds: float = 20.0) -> tuple[int, str]:
        """The exit code, and what was written to stderr."""
        _, errors = self.process.communicate(timeout=seconds)
        self.http.close()
        return self.process.returncode, errors


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, JSON decoded, the last one as it is."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]
