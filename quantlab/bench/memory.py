"""Peak memory of a real run on a checkpoint larger than what may be held, against what the dry run announced.

Writes a random Llama checkpoint, quantizes it through the command line and watches the process. Linux only: reads
/proc. Knows nothing about how memory is spent.
usage: python -m quantlab.bench.memory [--gigabytes 3.2] [--hidden 2048] [--recipe w4a16-gptq] [--samples 8]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantlab.bench.measure import SHIPPED_MODEL, append_rows, command
from quantlab.checkpoint.sizes import index_json, plan_shards
from quantlab.checkpoint.writer import write_json, write_shard
from quantlab.errors import QuantlabError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import block_tensor_shapes, tensor_shapes

BLOCKS_ALLOWED = 3  # blocks of 16-bit weights that a run may hold above its imports and announced activations
ESTIMATE_TOLERANCE = 0.15
POLL_SECONDS = 0.02
# transformers imports 150 MB of itself when the first tokenizer is loaded, so the baseline loads one.
IMPORTS = """
import pathlib, sys
import quantlab.cli.app, quantlab.quant.run
from quantlab.text import load_tokenizer
load_tokenizer(pathlib.Path(sys.argv[1]))
print(open("/proc/self/status").read())
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """Bytes: one block's weights as stored, the import baseline, the peak above it, and what the dry run announced."""

    block: int
    baseline: int
    peak: int
    announced: int
    activations: int

    @property
    def limit(self) -> int:
        """The most that the run may take above the baseline."""
        return BLOCKS_ALLOWED * self.block + self.activations


def random_config(hidden: int, gigabytes: float) -> dict[str, Any]:
    """config.json of a Llama with TinyLlama's proportions and enough blocks for `gigabytes` of bfloat16."""
    raw: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 512,
        "num_hidden_layers": 1,
        "vocab_size": 8192,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    block = block_bytes(ModelConfig.from_json(raw, "config.json"))
    return raw | {"num_hidden_layers": max(24, int(gigabytes * 1e9 // block) + 1)}


def block_bytes(config: ModelConfig) -> int:
    """Bytes of one block's weights in bfloat16."""
    return sum(2 * _count(shape) for shape in block_tensor_shapes(config).values())


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def write_checkpoint(folder: Path, raw: dict[str, Any]) -> None:
    """A random checkpoint of that config, in shards of 1 GB, with the shipped tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shapes = tensor_shapes(ModelConfig.from_json(raw, str(folder)))
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)

    shards = plan_shards([(name, "BF16", shape) for name, shape in shapes.items()], 10**9)
    for shard in shards:
        write_shard(folder / shard.name, shard, tensor)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", index_json(shards))
    write_json(folder / "config.json", raw)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED_MODEL / name, folder / name)


def peak_of(line: list[str], log: Path) -> int:
    """Run a command; returns the largest resident set it ever had, in bytes (VmHWM of its own address space)."""
    peak = 0
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=file)
        while process.poll() is None:
            peak = max(peak, _high_water(Path(f"/proc/{process.pid}/status")))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise QuantlabError(f"exit code {process.returncode}: {log.read_text().strip()[-300:]}", where=str(log))
    return peak


def _high_water(status: Path) -> int:
    try:
        return _parse_high_water(status.read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _parse_high_water(status: str) -> int:
    """Bytes of the VmHWM line of a /proc status; 0 for a process that has already let its memory go."""
    found = [line.split()[1] for line in status.split("\n") if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else 0


def measure(model: Path, out: Path, words: list[str], block: int) -> Figures:
    """The dry run's announcement, the import baseline and the real run's peak."""
    dry = subprocess.run([*command(model, out, words), "--dry-run"], capture_output=True, text=True)
    if dry.returncode:
        raise QuantlabError(f"the dry run failed: {dry.stderr.strip()[-300:]}")
    plan = json.loads(dry.stdout)
    line = [sys.executable, "-c", IMPORTS, str(model)]
    imports = subprocess.run(line, capture_output=True, text=True, check=True)
    baseline = _parse_high_water(imports.stdout)
    peak = peak_of(command(model, out, ["--restart", *words]), out.with_name(out.name + ".log"))
    activations = sum(item["bytes"] for item in plan["memory"] if "activation" in item["what"])
    return Figures(block, baseline, peak - baseline, plan["peak_memory_bytes"], activations)


def table(figures: Figures) -> Table:
    """The figures beside their limits."""
    view = Table(title="memory", title_justify="left")
    view.add_column("what")
    for column in ("MB", "blocks"):
        view.add_column(column, justify="right")
    rows = {
        "one block of weights (bfloat16)": figures.block,
        "import baseline": figures.baseline,
        "peak above the baseline": figures.peak,
        f"limit: {BLOCKS_ALLOWED} blocks + announced activations": figures.limit,
        "the dry run's estimate": figures.announced,
    }
    for name, size in rows.items():
        view.add_row(name, f"{size / 1e6:.0f}", f"{size / figures.block:.2f}")
    return view


def main() -> None:
    """Write, run, compare; exit code 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description="peak memory on a large random checkpoint, against the dry run")
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 512")
    # GPTQ alone holds what balanced holds (Hessians, factors, one block) in a fifth of its time.
    parser.add_argument("--recipe", default="w4a16-gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("work/bench/memory"))
    parser.add_argument("--rows", type=Path, help="append the figures as a JSON line to this file")
    asked = parser.parse_args()
    raw = random_config(asked.hidden, asked.gigabytes)
    model = asked.work / "random"
    write_checkpoint(model, raw)
    words = ["--recipe", asked.recipe, "--samples", str(asked.samples), "--seq-len", str(asked.seq_len)]
    words += ["--device", "cpu"]
    try:
        figures = measure(model, asked.work / "out", words, block_bytes(ModelConfig.from_json(raw, str(model))))
    except QuantlabError as error:
        sys.exit(error.one_line())
    Console(width=None if sys.stdout.isatty() else 120).print(table(figures))
    off = figures.announced / figures.peak - 1
    within = figures.peak <= figures.limit and abs(off) <= ESTIMATE_TOLERANCE
    print(
        f"{raw['num_hidden_layers']} blocks; estimate {100 * off:+.1f} %; {'within' if within else 'OVER'} the limits"
    )
    append_rows(asked.rows, [{"bench": "memory", "blocks": raw["num_hidden_layers"], "estimate_off": off}])
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
