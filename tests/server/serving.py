"""Starts servers for tests, each in a process of its own, and asks them over HTTP."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

RUNNING = Path(__file__).with_name("running.py")


class Server:
    """A server over the scripted engine; `ready` is the line that it printed."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        command = [sys.executable, "-W", "error", str(RUNNING), str(folder), json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1])
        self.ready = json.loads(line)
        self.url = self.ready["base_url"]
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: Any, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [
            line.rpartition(" ")[2] for line in lines if line.startswith((f"quantlab:{name}{{", f"quantlab:{name} "))
        ]
        return sum(map(float, values))

    def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait for `condition`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.02)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; returns the exit code and what was written to stderr."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, JSON decoded, the last one as it is."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]
