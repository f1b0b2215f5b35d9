"""What `quantlab bench offline` is to measure, as plain values; importing it costs nothing.

Knows nothing about how anything is measured.
"""

from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import UsageError

SHAPE_NAMES = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b", "llama-500m", "tiny")
SCHEME_NAMES = ("bf16", "int4", "int8", "int8-weights")
CASES = ("decode", "batch", "prefill", "ttft", "profile", "workload")
BASELINES = ("static", "continuous")
WORKLOADS = "128/128x1024,1000/1000x256,128/2048x256"
MOST_TOKENS, MOST_REQUESTS = 1 << 20, 100_000


@dataclass(frozen=True, slots=True)
class Setup:
    """One engine to measure: weights in `scheme`, keys and values in INT8 or not, the output layer in INT8 or not."""

    scheme: str
    int8_kv: bool
    int8_head: bool

    @property
    def name(self) -> str:
        """`int4`, `int4+kv8`, `int4+kv8+head8`."""
        return self.scheme + "+kv8" * self.int8_kv + "+head8" * self.int8_head


@dataclass(frozen=True, slots=True)
class Work:
    """`requests` of `prompt` tokens that want `output` more, all there at the start."""

    prompt: int
    output: int
    requests: int


@dataclass(frozen=True, slots=True)
class OfflineOptions:
    """A measurement; sizes that are None are the engine's own choice."""

    shape: str = "llama-3.1-8b"
    setups: tuple[Setup, ...] = ()
    cases: tuple[str, ...] = CASES
    workloads: tuple[Work, ...] = ()
    baselines: tuple[str, ...] = ()
    baseline_workloads: tuple[Work, ...] = ()
    load: tuple[str, ...] = ()
    device: str = "auto"
    max_model_len: int = 16384
    max_num_seqs: int | None = None
    max_batch_tokens: int | None = None
    block_size: int | None = None
    threads: int | None = None
    steps: int = 48
    out: Path | None = None

    def __post_init__(self) -> None:
        for work in self.workloads if "workload" in self.cases and self.setups else ():
            longest = work.prompt + work.output
            if longest > self.max_model_len:
                told = f"{work.prompt}/{work.output}x{work.requests} needs {longest} tokens, more than --max-model-len"
                fix = f"--max-model-len {longest}, or shorter --workloads"
                raise UsageError(f"{told} {self.max_model_len}", where="--workloads", fix=fix)


def parse_setups(text: str) -> tuple[Setup, ...]:
    """`int4,int4+kv8,int4+kv8+head8`; raises UsageError for anything else."""
    found = []
    for word in filter(None, text.split(",")):
        scheme, *extras = word.split("+")
        if scheme not in SCHEME_NAMES or set(extras) - {"kv8", "head8"}:
            known = f"one of {', '.join(SCHEME_NAMES)}, with +kv8 and +head8 behind it"
            raise UsageError(f"no setup is called {word[:40]!r}", where="--setups", fix=known)
        found.append(Setup(scheme, "kv8" in extras, "head8" in extras))
    return tuple(found)


def parse_workloads(text: str, where: str) -> tuple[Work, ...]:
    """`128/128x1024,1000/1000x256`: prompt / output x requests; raises UsageError for anything else."""
    found = []
    for word in filter(None, text.split(",")):
        lengths, _, requests = word.partition("x")
        prompt, _, output = lengths.partition("/")
        if not all(part.isdecimal() and 0 < int(part) <= MOST_TOKENS for part in (prompt, output, requests)):
            raise UsageError(f"{word[:40]!r} is not PROMPT/OUTPUTxREQUESTS", where=where, fix=f"{where} 128/128x256")
        if int(requests) > MOST_REQUESTS:
            raise UsageError(f"{requests} requests are over {MOST_REQUESTS}", where=where)
        found.append(Work(int(prompt), int(output), int(requests)))
    return tuple(found)


def parse_names(text: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Names by commas, each of them `known`; raises UsageError for another."""
    names = tuple(filter(None, text.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"{name[:40]!r} is not known", where=where, fix=f"one of {', '.join(known)}")
    return names
