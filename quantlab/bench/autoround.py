"""AutoRound on the same blocks, measured by the same evaluation: the peer to beat.

Wants an environment with the `bench` extra (`pip install -e '.[bench]'`); knows nothing about our own passes.
usage: python -m quantlab.bench.autoround MODEL --out DIR [--calibration PATH] [--iterations 100] [--evaluation PATH]
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.bench.measure import evaluation_files, held_out_ids
from quantlab.checkpoint.load import load_model
from quantlab.eval.perplexity import compare
from quantlab.quant.data import load_blocks
from quantlab.quant.options import CalibrationSpec
from quantlab.text import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def quantize(source: Path, out: Path, calibration: CalibrationSpec, iterations: int) -> float:
    """Symmetric INT4 g128 by AutoRound's SignSGD, fake-quantized into a plain folder `out`; returns its seconds."""
    blocks = load_blocks(calibration, load_tokenizer(source))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    started = time.monotonic()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        dataset=list(blocks.ids.split(1)),
        iters=iterations,
        nsamples=len(blocks.ids),
        seqlen=calibration.seq_len,
        batch_size=8,
        seed=calibration.seed,
        device_map="cpu",
    )
    quantized, _ = rounder.quantize()
    seconds = time.monotonic() - started
    quantized.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out / name)
    return seconds


def main() -> None:
    """Quantize, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description="AutoRound on our calibration blocks, measured by our evaluation")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", help="text, folder or dataset id; the bundled text by default")
    parser.add_argument("--evaluation", type=Path, nargs="*", help="text files or folders; the shipped text by default")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65_536)
    asked = parser.parse_args()
    spec = CalibrationSpec(source=asked.calibration, samples=asked.samples, seq_len=asked.seq_len)
    seconds = quantize(asked.model, asked.out, spec, asked.iterations)
    ids = held_out_ids(asked.model, evaluation_files(asked.evaluation), asked.tokens)
    baseline, candidate = (load_model(folder, torch.float32, "cpu") for folder in (asked.model, asked.out))
    fidelity = compare(baseline, candidate, ids)
    row = {
        "method": f"auto-round {asked.iterations} iterations",
        "model": asked.model.name,
        "seconds": round(seconds, 1),
        "baseline_perplexity": fidelity.baseline_perplexity,
        "perplexity": fidelity.perplexity,
        "ratio": fidelity.ratio,
        "kl": fidelity.kl,
        "agreement": fidelity.agreement,
        "tokens": fidelity.tokens,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
