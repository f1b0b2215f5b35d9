"""A server as a process: what signals do to it, and what it ends with."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import StartReal
from tests.server.serving import RUNNING
from tests.server.test_lifecycle import asking, in_flight


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_sigterm_drains_and_ends_well_a_second_signal_ends_at_once(start_real: StartReal) -> None:
    server = start_real(pace=0.1)
    with ThreadPoolExecutor() as pool:
        answer = asking(server, pool)
        server.until(lambda: in_flight(server, 1))
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: server.http.get("/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.wait()[0] == 130
        with pytest.raises(httpx.HTTPError):
            answer.result()
    server.until(lambda: not alive(server.engine_pid))


def test_sigterm_ends_an_idle_server_without_a_word(start_real: StartReal) -> None:
    server = start_real()
    assert server.complete("It was", max_tokens=2).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "")
    assert not alive(server.engine_pid)


def test_an_engine_killed_ends_the_server_with_its_code(start_real: StartReal) -> None:
    server = start_real()
    os.kill(server.engine_pid, signal.SIGKILL)
    code, errors = server.wait()
    assert code == 14 and "QL1401" in errors and "SIGKILL" in errors


def test_a_server_that_is_killed_takes_its_engine_with_it(start_real: StartReal) -> None:
    server = start_real()
    server.process.kill()
    server.wait()
    server.until(lambda: not alive(server.engine_pid))
    assert server.process.returncode == -signal.SIGKILL


def test_a_folder_that_cannot_be_loaded_ends_with_its_own_code(books_5m: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.symlink_to(books_5m)
    done = subprocess.run([sys.executable, str(RUNNING), str(broken), "{}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr == f"error: QL0401 {broken}: a tensor is missing; try: download it again\n"
