"""The loop: schedule a step, launch it, read back the one before, and say what each request got.

Knows nothing about text, processes or tensors.
"""

from collections.abc import Callable
from dataclasses import replace

from quantlab.errors import UsageError
from quantlab.runtime.batch import Batch, Launched, Runner, Sampled, Slice
from quantlab.runtime.checks import check_request
from quantlab.runtime.options import EngineInfo, EngineStats
from quantlab.runtime.request import FinishReason, Grammar, Request, Sequence, TokenEvent, TokenLogprobs
from quantlab.runtime.scheduler import Scheduler


class Engine:
    """Continues requests together, one step at a time; one thread calls it.

    With `overlap` a step is launched before the one before is read back, so that the device never waits for this
    code; a sequence that ends unforeseen has then computed one token too many, which is dropped. Where a launch
    computes before it returns, overlap only delays tokens.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        overlap: bool = True,
        compile_grammar: Callable[[Grammar], object] | None = None,
    ) -> None:
        self.info = info
        self._compile_grammar = compile_grammar
        self._scheduler = scheduler
        self._runner = runner
        self._overlap = overlap
        self._eos = frozenset(info.eos_token_ids)
        self._live: dict[str, Sequence] = {}
        self._under_way: tuple[Batch, Launched] | None = None
        self._told: list[TokenEvent] = []  # what happened between two steps
        self._generated = 0

    def add(self, request: Request) -> None:
        """Let `request` wait for its turn; raises UsageError when it can never run, or its id is that of another."""
        if request.request_id in self._live:
            raise UsageError("a request with this id is running", where=f"request {request.request_id}")
        check_request(request, self.info)
        self._live[request.request_id] = self._scheduler.add(request)

    def prepare(self, grammar: Grammar) -> None:
        """Compile `grammar`, which any thread may do while others step, so that its first request holds up nobody."""
        if self._compile_grammar is not None:
            self._compile_grammar(grammar)

    def abort(self, request_id: str) -> bool:
        """End a request: its blocks are free when this returns, and the next step says "abort"; unknown ids are none's.

        Returns whether the request was known.
        """
        sequence = self._live.pop(request_id, None)
        if sequence is None:
            return False
        self._scheduler.remove(sequence)
        self._told.append(TokenEvent(request_id, finish_reason="abort", cached_tokens=sequence.cached))
        return True

    def step(self) -> list[TokenEvent]:
        """Launch the next step if there is anything to compute, and report the one that has ended."""
        batch = self._scheduler.schedule()
        ended = (batch, self._launch(batch)) if batch is not None else None
        if self._overlap:
            ended, self._under_way = self._under_way, ended
        told, self._told = self._told, []
        return told + (self._commit(ended[0], ended[1].result()) if ended is not None else [])

    def _launch(self, batch: Batch) -> Launched:
        """Begin a step; if that fails (no memory, an impatient user), what is not read back is computed anew."""
        try:
            return self._runner.launch(batch)
        except BaseException:
            self._scheduler.undo(batch)
            if self._under_way is not None:
                self._scheduler.undo(self._under_way[0])
                self._under_way = None
            raise

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return bool(self._live or self._told or self._under_way)

    def stats(self) -> EngineStats:
        """Gauges of now, counters since the start."""
        return replace(self._scheduler.stats(), generation_tokens=self._generated)

    def _commit(self, batch: Batch, sampled: Sampled) -> list[TokenEvent]:
        """What an ended step gave each of its sequences; those that have left meanwhile get nothing."""
        failed = dict(sampled.failed)
        events = []
        drawn = 0
        for index, part in enumerate(batch.slices):
            sequence, place = part.sequence, drawn
            if part.samples:
                drawn += 1
                sequence.pending -= 1
            if self._live.get(sequence.request.request_id) is not sequence:
                continue
            if index in failed:
                events.append(self._fail(sequence, failed[index]))
                continue
            self._scheduler.computed(part)
            if sampled.prompt_logprobs is not None:
                keep_prompt_logprobs(part, sampled, index)
            if part.samples:
                events.append(self._advance(sequence, sampled, place))
            elif not sequence.limit and part.start + part.count == sequence.length:
                events.append(self._end(sequence, "length"))
        return events

    def _advance(self, sequence: Sequence, sampled: Sampled, place: int) -> TokenEvent:
        """One more token for `sequence`, which may be its last."""
        token = sampled.token_ids[place]
        logprobs = sampled.logprobs[place] if sampled.logprobs is not None else None
        self._generated += 1
        self._scheduler.append(sequence, token)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            self._leave(sequence)
        return TokenEvent(
            sequence.request.request_id,
            (token,),
            None if logprobs is None else (logprobs,),
            reason,
            token if reason == "stop" else None,
            sequence.cached,
            prompt_logprobs(sequence) if len(sequence.output_ids) == 1 else None,
            queue_seconds=sequence.queued if len(sequence.output_ids) == 1 else 0.0,
        )

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params, count = sequence.request.params, len(sequence.output_ids)
        if token in self._eos or token in params.stop_token_ids:
            # A grammar allows its end when its text is whole, and then nothing else.
            guided = params.grammar is not None
            ends = token in params.stop_token_ids or guided or not params.ignore_eos
            if ends and (guided or count > params.min_tokens):
                return "stop"
        return "length" if count >= sequence.limit else None

    def _end(self, sequence: Sequence, reason: FinishReason) -> TokenEvent:
        """The only event of a request that asked for no token."""
        self._leave(sequence)
        return TokenEvent(
            sequence.request.request_id,
            finish_reason=reason,
            cached_tokens=sequence.cached,
            prompt_logprobs=prompt_logprobs(sequence),
            queue_seconds=sequence.queued,
        )

    def _fail(self, sequence: Sequence, why: str) -> TokenEvent:
        del self._live[sequence.request.request_id]
        self._scheduler.fail(sequence)
        return TokenEvent(sequence.request.request_id, finish_reason="error", cached_tokens=sequence.cached, error=why)

    def _leave(self, sequence: Sequence) -> None:
        del self._live[sequence.request.request_id]
        self._scheduler.remove(sequence)


def keep_prompt_logprobs(part: Slice, sampled: Sampled, index: int) -> None:
    """Append those of the tokens that follow the positions of `part`; what is computed again is kept once."""
    found = sampled.prompt_logprobs[index] if sampled.prompt_logprobs is not None else None
    if found is None:
        return
    kept = part.sequence.prompt_logprobs
    if not kept:
        kept.append(None)  # nothing comes before the first token
    kept += found[len(kept) - part.start - 1 :]


def prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    """Those of the prompt, for the first event, if they were asked for."""
    if sequence.request.params.prompt_logprobs is None:
        return None
    return tuple(sequence.prompt_logprobs) or (None,)
