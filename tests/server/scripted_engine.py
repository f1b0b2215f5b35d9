"""An engine process without a model: it says the prompt again and again; the real scheduler hands out the blocks.

Run as `scripted_engine.py SECONDS FD`, SECONDS a step. `cache_salt` asks for accidents: "crash" ends the process in the
middle of a step, "raise" raises there, "hang" goes on for ever, "fail" fails the one sequence.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import CheckpointError
from quantlab.log import configure
from quantlab.runtime.batch import Batch, Sampled, Slice
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.runtime.request import TokenLogprobs
from quantlab.runtime.scheduler import Scheduler
from quantlab.server.engine_loop import serve

VOCAB, LENGTH, BLOCKS = 8192, 256, 256


@dataclass
class Done:
    sampled: Sampled

    def result(self) -> Sampled:
        return self.sampled


class EchoRunner:
    """The token after the prompt's last is its first, and so on round."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def launch(self, batch: Batch) -> Done:
        for part in batch.slices:
            accident(part)
        time.sleep(self.seconds)
        sampling = [part for part in batch.slices if part.samples]
        salts = [part.sequence.request.cache_salt for part in batch.slices]
        failed = tuple((i, "no luck") for i, salt in enumerate(salts) if salt == "fail")
        logprobs = tuple(made_up(part) for part in sampling)
        prompts = tuple(prompt_logprobs(part) for part in batch.slices)
        return Done(Sampled(tuple(next_token(part) for part in sampling), logprobs, prompts, failed))


def accident(part: Slice) -> None:
    match part.sequence.request.cache_salt:
        case "crash":
            os._exit(3)
        case "hang":
            time.sleep(1000)
        case "raise":
            raise RuntimeError("the device is on fire")


def next_token(part: Slice) -> int:
    prompt = part.sequence.request.prompt_ids
    return prompt[(part.start + part.count) % len(prompt)]


def made_up(part: Slice) -> TokenLogprobs | None:
    wanted = part.sequence.request.params.logprobs
    if wanted is None:
        return None
    token = next_token(part)
    return TokenLogprobs(-0.5, 1, tuple((token + i, -0.5 - i) for i in range(wanted)))


def prompt_logprobs(part: Slice) -> tuple[TokenLogprobs, ...] | None:
    request = part.sequence.request
    if request.params.prompt_logprobs is None:
        return None
    known = min(part.start + part.count, len(request.prompt_ids) - 1) - part.start
    return tuple(TokenLogprobs(-1.0, 2, ()) for _ in range(known))


def build(seconds: float, folder: Path, options: EngineOptions) -> Engine:
    if folder.name == "endless":
        time.sleep(1000)
    if folder.name == "broken":
        raise CheckpointError("a tensor is missing", where=str(folder), fix="download it again")
    info = EngineInfo(
        model=folder.name, architecture="none", scheme="scripted", device="cpu", dtype="none", weight_bytes=0,
        kv_dtype="none", kv_bytes=0, block_size=16, num_blocks=BLOCKS, max_model_len=options.max_model_len or LENGTH,
        max_num_seqs=options.max_num_seqs or 8, max_batch_tokens=512, vocab_size=VOCAB, eos_token_ids=(0,),
        kernels=("all layers: none",), startup_seconds=0.0,
    )  # fmt: skip
    return Engine(Scheduler(info, options.policy, options.prefix_caching), EchoRunner(seconds), info, overlap=False)


if __name__ == "__main__":
    configure(debug=False)
    pace = float(sys.argv[1])
    sys.exit(serve(int(sys.argv[2]), lambda folder, options: build(pace, folder, options)))
