"""One request for text: what is asked, and what comes back token by token.

Plain values without torch, sent between processes as they are. Knows nothing about text, models or scheduling.
"""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_object", "json_schema"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text must be: any JSON object, or JSON after `schema` (its text)."""

    kind: GrammarKind
    schema: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Neutral values switch a setting off: top_p 1, top_k 0, min_p 0, penalties 0 (repetition 1).

    temperature 0 is greedy. `seed` fixes this request's draws whatever else runs. `logprobs` n gives the chosen
    token's log probability and the n likeliest tokens', `prompt_logprobs` the same for the prompt. `max_tokens` None
    ends at the model's length. Stop strings are the caller's: this layer sees token ids alone.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of token ids and how to continue it; `priority` lower is sooner, `cache_salt` isolates its prefix."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """ln p of a token, its rank (1 is the likeliest), and the likeliest tokens with theirs, likeliest first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step gave one request; the last event of a request has a `finish_reason`.

    `logprobs` is parallel to `token_ids` when asked for. `stop_token` is the token that ended it (it is the last of
    `token_ids`). `cached_tokens` of the prompt came from the prefix cache. `prompt_logprobs`, on the first event only,
    has None for the first prompt token; `queue_seconds`, on the first too, is the wait for the first step. `error` says
    in one sentence why a request ended with "error".
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    error: str | None = None
    queue_seconds: float = 0.0


@dataclass(slots=True)
class Sequence:
    """A request inside the engine: the only mutable state of it, owned by the scheduler.

    `computed` tokens have their keys and values in `block_ids`. `slot` is its row in the runner's per-sequence
    state while it runs. `pending` sampled tokens are on the device and not read back yet. `order` is its place in
    the order of arrival, `queued` the seconds it waited for its first step, `limit` the most output tokens it may
    have. `keys` name its full blocks in the prefix cache. `redo` tokens were computed and lost to a preemption.
    `prompt_logprobs` fills up until the first event takes it.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    pending: int = 0
    slot: int | None = None
    preemptions: int = 0
    arrived: float = 0.0
    queued: float = 0.0
    order: int = 0
    limit: int = 0
    keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    redo: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and output known here."""
        return self.prompt_length + len(self.output_ids)

    def token(self, position: int) -> int:
        """The token at `position` of prompt and output."""
        prompt = self.prompt_length
        return self.request.prompt_ids[position] if position < prompt else self.output_ids[position - prompt]

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The known tokens from `start` up to `stop` of prompt and output."""
        prompt = self.prompt_length
        if stop <= prompt:
            return self.request.prompt_ids[start:stop]
        return self.request.prompt_ids[start:prompt] + tuple(self.output_ids[max(start - prompt, 0) : stop - prompt])
