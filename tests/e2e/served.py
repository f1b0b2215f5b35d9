"""`quantlab serve` as a user starts it: a process of its own, a real model, real HTTP."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

REPOSITORY = Path(__file__).parent.parent.parent
# Small enough that a leak of a few blocks shows, and that a test can fill it.
SMALL = ("--kv-memory", "16MB", "--max-num-seqs", "32", "--threads", "1")


class Served:
    """A running server; `ready` is the line it printed when it took work."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path, ready: dict[str, Any]):
        self.process = process
        self.log = log
        self.ready = ready
        self.url = str(ready["base_url"]).removesuffix("/v1")
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def client(self, key: str = "none") -> OpenAI:
        """The official client; it never tries again by itself, so that a test sees every failure."""
        http = httpx.Client(trust_env=False)
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, http_client=http)

    @property
    def model(self) -> str:
        """The name that it serves."""
        return str(self.http.get("/v1/models").json()["data"][0]["id"])

    def metrics(self) -> dict[str, float]:
        """Each metric's sum over its labels, without prefix and buckets."""
        found: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            name, _, value = line.partition("{")[0].partition(" ")[0], "", line.rpartition(" ")[2]
            if line and not line.startswith("#") and "_bucket" not in name:
                name = name.removeprefix("quantlab:")
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def engine_pid(self) -> int:
        """The engine's process: the only child that runs one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children += [pid for task in tasks for pid in (task / "children").read_text().split()]
        engines = {pid for pid in children if b"engine" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(engines) == 1, children
        return int(engines.pop())

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for its end; the exit code and what it wrote to stderr."""
        code = self.process.wait(seconds)
        return code, self.log.read_text()

    def terminate(self) -> tuple[int, str]:
        """SIGTERM and wait."""
        self.process.terminate()
        return self.end()


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[Served]:
    """A server for the model in `folder`, ended with the block whatever happened."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "quantlab", "serve", str(folder), "--port", "0", "--json", *words]
    with tempfile.TemporaryDirectory() as place, (Path(place) / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, (Path(place) / "log").read_text()
            served = Served(process, Path(place) / "log", json.loads(line))
            with served.http:
                yield served
        finally:
            process.kill()
            process.wait(30)
            process.stdout.close()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait for a condition; the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not come about"
        time.sleep(0.02)
    return time.monotonic() - begin
