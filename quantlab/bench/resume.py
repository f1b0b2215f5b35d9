"""Kill a run at random points, run the same command again, and compare every file with an uninterrupted run's.

The kill is SIGKILL: nothing in the process can tidy up. Knows nothing about journals or stages.
usage: python -m quantlab.bench.resume [MODEL] [--points 25] [--quality balanced] [--seed 0]
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from quantlab.bench.measure import SHIPPED_MODEL, append_rows, command


@dataclass(frozen=True, slots=True)
class Point:
    """One kill: when, whether the run was still going, and which files came out different after the resume."""

    seconds: float
    killed: bool
    resumed_seconds: float
    different: tuple[str, ...]


def digests(folder: Path) -> dict[str, str]:
    """File name inside `folder` -> SHA-256, for every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(wanted: dict[str, str], found: dict[str, str]) -> tuple[str, ...]:
    """Names that are missing, new or different."""
    return tuple(sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)))


def run(line: list[str], log: Path) -> float:
    """Run to the end; returns the seconds, exits with the log's last line if it fails."""
    started = time.monotonic()
    with log.open("a") as file:
        code = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=file).returncode
    if code:
        sys.exit(f"{log}: exit code {code}: {log.read_text().strip().split(chr(10))[-1]}")
    return time.monotonic() - started


def kill_after(line: list[str], seconds: float, log: Path) -> bool:
    """Start a command and kill it after `seconds`; False if it had finished by then."""
    with log.open("a") as file:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=file)
        try:
            process.wait(timeout=seconds)
            return False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True


def interrupt(model: Path, folder: Path, words: list[str], seconds: float, wanted: dict[str, str]) -> Point:
    """One point: a fresh place, a kill, a resume, a comparison."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    line, log = command(model, folder / "out", words), folder / "log"
    killed = kill_after(line, seconds, log)
    # A kill between the final rename and the exit leaves a finished folder: whatever is there must be whole.
    early = differences(wanted, digests(folder / "out")) if (folder / "out").exists() else ()
    resumed = run(line, log)
    different = differences(wanted, digests(folder / "out"))
    return Point(seconds, killed, resumed, different + tuple(f"{name} (before the resume)" for name in early))


def main() -> None:
    """Run once whole, then kill and resume; exit code 1 if any file ever differs."""
    parser = argparse.ArgumentParser(description="kill at random points, resume, compare every file")
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED_MODEL)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--quality", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("work/bench/resume"))
    parser.add_argument("--rows", type=Path, help="append the figures as a JSON line to this file")
    asked = parser.parse_args()
    words = ["--quality", asked.quality, "--samples", str(asked.samples), "--device", "cpu"]
    whole = asked.work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    seconds = run(command(asked.model, whole / "out", words), whole / "log")
    wanted = digests(whole / "out")
    print(f"whole run: {seconds:.1f} s, {len(wanted)} files")
    draw = random.Random(asked.seed)
    points = []
    for number in range(asked.points):
        point = interrupt(asked.model, asked.work / "point", words, draw.uniform(0.1, seconds), wanted)
        points.append(point)
        verdict = "identical" if not point.different else f"DIFFERENT: {', '.join(point.different)}"
        state = "killed" if point.killed else "finished before"
        line = f"{number + 1:2}/{asked.points}  {state} {point.seconds:5.1f} s, then {point.resumed_seconds:5.1f} s"
        print(f"{line}: {verdict}", flush=True)
    same = sum(not point.different for point in points)
    killed = sum(point.killed for point in points)
    print(f"{same} of {len(points)} identical ({killed} killed while running)")
    append_rows(asked.rows, [{"bench": "resume", "points": len(points), "killed": killed, "identical": same}])
    sys.exit(0 if same == len(points) else 1)


if __name__ == "__main__":
    main()
