"""A `quantlab serve` of its own for a bench: started as a user would, watched from outside, ended with the block.

Knows nothing about what is measured.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import QuantlabError

STOP_SECONDS = 60


@dataclass(frozen=True, slots=True)
class OwnServer:
    """A running server; `ready` is the line that it printed when it took work."""

    process: "subprocess.Popen[str]"
    ready: dict[str, Any]

    @property
    def url(self) -> str:
        """Its address, with /v1."""
        return f"{str(self.ready['base_url']).removesuffix('/v1')}/v1"

    def resident(self) -> int:
        """Resident bytes of the server and of every process that it started."""
        return sum(_resident(pid) for pid in _family(self.process.pid))

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)


@contextmanager
def own_server(folder: Path, words: Sequence[str], log: Path) -> Iterator[OwnServer]:
    """A server for the model in `folder` on a free port; raises QuantlabError with its last line if it does not start.

    What it says goes to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "quantlab", "serve", str(folder), "--port", "0", "--json", *words]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=_environment())
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                told = log.read_text().strip().split("\n")[-1]
                raise QuantlabError(f"the server did not start: {told}", where=str(log))
            yield OwnServer(process, json.loads(line))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            process.stdout.close()


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(each for children in lists for child in children for each in _family(int(child)))]


def _resident(pid: int) -> int:
    """Resident bytes of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _environment() -> dict[str, str]:
    """Ours, without a limit on threads: the server's own option says how many."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
