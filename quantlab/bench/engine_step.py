"""Time of a step in the engine's own code, without a model: `python -m quantlab.bench.engine_step`.

Knows nothing about models: the runner here gives every sequence the same token at once.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass

from quantlab.runtime.batch import Batch, Sampled
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineInfo
from quantlab.runtime.request import Request, SamplingParams
from quantlab.runtime.scheduler import Scheduler

VOCAB, BLOCK = 128_256, 16
WARM_UP = 16  # one block of tokens: each sequence has taken a block before the clock starts


@dataclass(frozen=True, slots=True)
class Ready:
    """A step that was done when it was launched."""

    sampled: Sampled

    def result(self) -> Sampled:
        """What it sampled."""
        return self.sampled


class InstantRunner:
    """Takes no time and gives every sequence the token 7."""

    def launch(self, batch: Batch) -> Ready:
        """A step that is done."""
        return Ready(Sampled((7,) * sum(part.samples for part in batch.slices)))


def build(sequences: int, prompt: int, tokens: int) -> Engine:
    """An engine in which `sequences` requests of `prompt` tokens wait, all of which fit."""
    blocks = sequences * (-(-(prompt + tokens) // BLOCK) + 1)
    info = EngineInfo(
        model="none", architecture="none", scheme="none", device="cpu", dtype="none", weight_bytes=0, kv_dtype="none",
        kv_bytes=0, block_size=BLOCK, num_blocks=blocks, max_model_len=prompt + tokens, max_num_seqs=sequences,
        max_batch_tokens=8192, vocab_size=VOCAB, eos_token_ids=(VOCAB - 1,), kernels=(), startup_seconds=0.0,
    )  # fmt: skip
    engine = Engine(Scheduler(info), InstantRunner(), info)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for number in range(sequences):
        # Different prompts, so that nothing is shared.
        engine.add(Request(str(number), tuple((number * 31 + place) % VOCAB for place in range(prompt)), params))
    return engine


def measure(sequences: int, prompt: int, steps: int) -> dict[str, float]:
    """Seconds of `steps` steps in which every sequence computes one token, and of all prompts before them."""
    engine = build(sequences, prompt, steps + WARM_UP + 8)
    started = time.perf_counter()
    while engine.stats().generation_tokens < sequences:
        engine.step()
    prompts = time.perf_counter() - started
    for _ in range(WARM_UP):
        engine.step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        events = engine.step()
        times.append(time.perf_counter() - started)
        assert len(events) == sequences
    return {"median": statistics.median(times), "worst": max(times), "prompts": prompts}


def main() -> None:
    """Print one line of JSON for each number of sequences."""
    parser = argparse.ArgumentParser(description="Milliseconds of a step in the engine's own code.")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    for sequences in arguments.sequences:
        times = measure(sequences, arguments.prompt, arguments.steps)
        print(json.dumps({"sequences": sequences, **{f"{k}_ms": round(1e3 * v, 3) for k, v in times.items()}}))


if __name__ == "__main__":
    main()
