"""What this machine has, and what each missing piece costs: findings as plain values.

Knows nothing about terminals. Each probe answers for itself, so one that fails does not hide the others.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from quantlab.units import human_bytes

Status = Literal["ok", "note", "missing"]
# Lowest and first unsupported version of what the core needs; the same figures as in pyproject.toml.
REQUIRED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "triton": ("3.6", "3.10"),
    "safetensors": ("0.5", "1"),
    "datasets": ("4.0", "6"),
}
COSTS = {
    "torch": "nothing can be quantized; inspect, recipes and --dry-run still work",
    "transformers": "no tokenizer, so no calibration text can be read",
    "triton": "the GPU kernels cannot be used; everything on the CPU works",
    "safetensors": "nothing: quantlab reads and writes the format itself",
    "datasets": "no parquet files and no hub datasets as calibration text; .txt and .jsonl work",
}
OPTIONAL = ("triton", "safetensors", "datasets")
# Extras of quantlab: what they are for, and the packages that tell whether they are installed.
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "serve": (
        "quantlab serve does not start, and no text can be made to follow a JSON schema",
        ("fastapi", "httptools", "llguidance", "msgspec", "prometheus-client", "uvicorn"),
    ),
    "eval": ("quantlab eval judges by text alone: no tasks", ("lm-eval",)),
}
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
LOW_RAM, LOW_DISK = 4 * 10**9, 10 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: what was found, what its absence costs and the command that fixes it."""

    name: str
    status: Status
    found: str
    cost: str | None = None
    fix: str | None = None


def examine() -> list[Finding]:
    """Every finding, most basic first; imports torch where it is installed."""
    findings = [python()]
    findings += [package(name) for name in REQUIRED]
    findings += [extra("compressed-tensors", "0.17.1", "transformers cannot load the output on this machine")]
    findings += [group(name) for name in GROUPS]
    torch = _torch()
    findings += [gpu(torch), cpu(), ram(), disk()]
    return findings if torch is None else [*findings, *serving()]


def serving() -> list[Finding]:
    """Which kernel serves which scheme on the device that the engine would choose."""
    from quantlab.runtime.backend import kernels_here

    return [Finding(f"serves {scheme}", "ok", kernel) for scheme, kernel in kernels_here().items()]


def python() -> Finding:
    """The interpreter."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", found)
    return Finding("python", "missing", found, "quantlab is tested with 3.11 to 3.13 only", "use Python 3.12")


def package(name: str, lookup: Callable[[str], str] = version) -> Finding:
    """One required package: there, and of a version that quantlab is tested with."""
    low, high = REQUIRED[name]
    status: Status = "note" if name in OPTIONAL else "missing"
    fix = f"pip install '{name}>={low},<{high}'"
    try:
        found = lookup(name)
    except PackageNotFoundError:
        return Finding(name, status, "not installed", COSTS[name], fix)
    if not numbers(low) <= numbers(found) < numbers(high):
        return Finding(name, "note", found, f"outside the tested range {low} to {high}", fix)
    return Finding(name, "ok", found)


def extra(name: str, lowest: str, cost: str, lookup: Callable[[str], str] = version) -> Finding:
    """One optional package."""
    try:
        return Finding(name, "ok", lookup(name))
    except PackageNotFoundError:
        return Finding(name, "note", "not installed", cost, f"pip install '{name}>={lowest}'")


def group(name: str, lookup: Callable[[str], str] = version) -> Finding:
    """One extra of quantlab: all of its packages, or the command that installs it."""
    cost, packages = GROUPS[name]
    absent = []
    for package_name in packages:
        try:
            lookup(package_name)
        except PackageNotFoundError:
            absent.append(package_name)
    if absent:
        return Finding(f"extra {name}", "note", f"without {', '.join(absent)}", cost, f"pip install 'quantlab[{name}]'")
    return Finding(f"extra {name}", "ok", "installed")


def numbers(text: str) -> tuple[int, ...]:
    """A version's leading numbers: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def gpu(torch: Any | None) -> Finding:
    """The CUDA devices that torch can use, or why it cannot."""
    slow = "quality best takes hours rather than minutes beyond 100M parameters"
    if torch is None:
        return Finding("gpu", "note", "unknown without torch", slow)
    if torch.cuda.is_available():
        return Finding("gpu", "ok", "; ".join(_device(torch, i) for i in range(torch.cuda.device_count())))
    if Path("/dev/nvidiactl").exists():
        fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        return Finding("gpu", "note", f"present, but torch {torch.__version__} cannot use it", slow, fix)
    return Finding("gpu", "note", "none", slow)


def _device(torch: Any, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {human_bytes(properties.total_memory)}, sm_{properties.major}{properties.minor}"


def _torch() -> Any | None:
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def cpu(info: Path = Path("/proc/cpuinfo")) -> Finding:
    """Cores, and whether they multiply in bfloat16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _read(info), re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    units = [flag for flag in BF16_FLAGS if flag in flags]
    if units:
        return Finding("cpu", "ok", f"{cores} cores, bfloat16 units ({', '.join(units)})")
    return Finding(
        "cpu", "note", f"{cores} cores, no bfloat16 units", "evaluation runs in float32, at twice the memory"
    )


def ram(info: Path = Path("/proc/meminfo")) -> Finding:
    """Memory that is free for use now."""
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(info), re.MULTILINE))
    if "MemAvailable" not in values:
        return Finding("memory", "note", "unknown on this system")
    free, total = int(values["MemAvailable"]) * 1024, int(values.get("MemTotal", 0)) * 1024
    found = f"{human_bytes(free)} free of {human_bytes(total)}"
    if free < LOW_RAM:
        fix = "quantlab quantize MODEL --dry-run"
        return Finding("memory", "note", found, "large models may not fit; the dry run says what is needed", fix)
    return Finding("memory", "ok", found)


def disk(folder: Path = Path()) -> Finding:
    """Space where the command was started."""
    free = shutil.disk_usage(folder).free
    found = f"{human_bytes(free)} free in {folder.resolve()}"
    if free < LOW_DISK:
        return Finding(
            "disk", "note", found, "a 7B model in INT4 takes 4 GB", "quantlab quantize MODEL --out /else/where"
        )
    return Finding("disk", "ok", found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
