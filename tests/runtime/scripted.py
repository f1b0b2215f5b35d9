"""A runner without a model: it keeps tokens where keys and values would be, and the next token depends on all of them.

A block that is shared wrongly, written too late or read after somebody else took it gives other tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from zlib import crc32

from quantlab.runtime.batch import Batch, Sampled, Slice
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineInfo, Policy
from quantlab.runtime.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from quantlab.runtime.scheduler import Scheduler

VOCAB, EOS = 50, 0
INFO = EngineInfo(
    model="scripted", architecture="none", scheme="none", device="cpu", dtype="none", weight_bytes=0, kv_dtype="none",
    kv_bytes=0, block_size=4, num_blocks=64, max_model_len=64, max_num_seqs=8, max_batch_tokens=32, vocab_size=VOCAB,
    eos_token_ids=(EOS,), kernels=(), startup_seconds=0.0,
)  # fmt: skip


def next_token(tokens: list[int]) -> int:
    """What follows `tokens`; about one in twenty is the end."""
    drawn = crc32(bytes(tokens))
    return EOS if drawn % 20 == 0 else 1 + drawn % (VOCAB - 1)


def expected(request: Request, max_model_len: int = INFO.max_model_len) -> tuple[list[int], FinishReason]:
    """What `request` alone gives, token by token, without an engine."""
    tokens, params = list(request.prompt_ids), request.params
    limit = max_model_len - len(tokens) if params.max_tokens is None else params.max_tokens
    while len(tokens) < min(max_model_len, len(request.prompt_ids) + limit):
        tokens.append(next_token(tokens))
        count = len(tokens) - len(request.prompt_ids)
        ends = tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos)
        if ends and count > params.min_tokens:
            return tokens[len(request.prompt_ids) :], "stop"
    return tokens[len(request.prompt_ids) :], "length"


@dataclass
class Ready:
    """A step that is done; it is read once, and in order."""

    sampled: Sampled
    read: list[int]
    step: int

    def result(self) -> Sampled:
        self.read.append(self.step)
        return self.sampled


@dataclass
class ScriptedRunner:
    """Writes tokens into blocks and draws the next from what it reads there; `fails` names requests to break."""

    info: EngineInfo = INFO
    fails: frozenset[str] = frozenset()
    cache: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    breaks: list[bool] = field(default_factory=list)  # for each launch to come, whether it cannot be

    def launch(self, batch: Batch) -> Ready:
        if self.breaks and self.breaks.pop(0):
            raise MemoryError
        self._check(batch)
        for part in batch.slices:
            self._write(part)
        drawn = [(part, next_token(self._read(part))) for part in batch.slices if part.samples]
        for part, token in drawn:
            assert part.sequence.slot is not None
            self.last[part.sequence.slot] = token
        failed = tuple(
            (index, "wrong numbers")
            for index, part in enumerate(batch.slices)
            if part.sequence.request.request_id in self.fails and part.samples
        )
        return Ready(
            Sampled(
                tuple(token for _, token in drawn),
                tuple(TokenLogprobs(-float(token), 1) for _, token in drawn),
                tuple(self._prompt_logprobs(part) for part in batch.slices),
                failed,
            ),
            self.read,
            batch.step,
        )

    def _check(self, batch: Batch) -> None:
        """A step is within its budget, and slots change hands in the open."""
        assert 0 < batch.tokens <= self.info.max_batch_tokens
        assert all(batch.step > earlier.step for earlier in self.batches[-1:])
        self.batches.append(batch)
        for slot in batch.released:
            self.owners.pop(slot, None)  # its owner's first step may never have come here
        for sequence in batch.admitted:
            assert sequence.slot is not None and sequence.slot not in self.owners
            self.owners[sequence.slot] = sequence.request.request_id
        for part in batch.slices:
            assert part.sequence.slot is not None and part.count > 0
            assert self.owners[part.sequence.slot] == part.sequence.request.request_id
        assert len({part.sequence.slot for part in batch.slices}) == len(batch.slices) <= self.info.max_num_seqs

    def _place(self, part: Slice, position: int) -> int:
        size = self.info.block_size
        return part.sequence.block_ids[position // size] * size + position % size

    def _write(self, part: Slice) -> None:
        sequence = part.sequence
        for position in range(part.start, part.start + part.count):
            assert sequence.slot is not None and position <= sequence.length
            known = position < sequence.length
            self.cache[self._place(part, position)] = sequence.token(position) if known else self.last[sequence.slot]

    def _read(self, part: Slice) -> list[int]:
        return [self.cache[self._place(part, position)] for position in range(part.start + part.count)]

    def _prompt_logprobs(self, part: Slice) -> tuple[TokenLogprobs, ...] | None:
        """For each prompt token that follows a position of the slice, its id as a number."""
        sequence = part.sequence
        if sequence.request.params.prompt_logprobs is None:
            return None
        ends = min(part.start + part.count, sequence.prompt_length - 1)
        return tuple(TokenLogprobs(-float(sequence.token(p + 1)), 1) for p in range(part.start, ends))


@dataclass
class Bench:
    """An engine on a scripted runner, and all that it said."""

    engine: Engine
    scheduler: Scheduler
    runner: ScriptedRunner
    events: list[TokenEvent] = field(default_factory=list)

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.engine.add(request)

    def step(self) -> list[TokenEvent]:
        events = self.engine.step()
        self.scheduler.check_integrity()
        self.events += events
        return events

    def run(self) -> None:
        """Step until nothing is left; a request that never ends makes it fail."""
        for _ in range(20_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, request_id: str) -> list[int]:
        return [t for event in self.events if event.request_id == request_id for t in event.token_ids]

    def endings(self, request_id: str) -> list[FinishReason]:
        return [e.finish_reason for e in self.events if e.request_id == request_id and e.finish_reason is not None]

    def assert_as_alone(self, *requests: Request) -> None:
        """Every request got what it gets alone, and one ending."""
        for request in requests:
            tokens, reason = expected(request, self.engine.info.max_model_len)
            assert self.tokens(request.request_id) == tokens
            assert self.endings(request.request_id) == [reason]


def bench(
    overlap: bool = True,
    policy: Policy = "fcfs",
    prefix_caching: bool = True,
    fails: frozenset[str] = frozenset(),
    changes: dict[str, int] | None = None,
) -> Bench:
    """An engine of the scripted runner; `changes` replaces numbers of INFO."""
    info = replace(INFO, **(changes or {}))
    scheduler, runner = Scheduler(info, policy, prefix_caching), ScriptedRunner(info, fails)
    return Bench(Engine(scheduler, runner, info, overlap), scheduler, runner)


def prompts(count: int, length: int = 5) -> Iterator[tuple[int, ...]]:
    """Different prompts."""
    for number in range(count):
        yield tuple(1 + (number * 7 + place * 3 + number * place) % (VOCAB - 1) for place in range(length))


def ask(name: str, prompt: tuple[int, ...], priority: int = 0, salt: str = "", **settings: object) -> Request:
    """A request; `settings` are those of SamplingParams."""
    return Request(name, prompt, SamplingParams(**settings), priority, salt)  # type: ignore[arg-type]
