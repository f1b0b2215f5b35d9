"""The bodies of answers, as OpenAI's clients read them, and of the pieces of a stream.

msgspec structs: one is encoded in about a microsecond, and a stream sends one a token. Knows nothing about requests.
"""

from typing import Literal

import msgspec
from starlette.responses import Response

FinishReason = Literal["stop", "length"]


class CachedTokens(msgspec.Struct):
    """How many tokens of the prompt came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Counts of tokens; the prompt counts once however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, an entry a token; None for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One text, or in a stream one piece of it. `stop_reason` is the stop string or token that ended it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct):
    """The answer of /v1/completions, or one piece of its stream: they have the same shape."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
    object: Literal["text_completion"] = "text_completion"


class TopLogprob(msgspec.Struct):
    """A token that could have come; `bytes` is its UTF-8, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """The tokens of an answer or of a piece of it."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    """What the model says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct):
    """The answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """A piece of an answer; the first has the role."""

    content: str | None = None
    role: Literal["assistant"] | None = None


class ChunkChoice(msgspec.Struct):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class ChatChunk(msgspec.Struct):
    """A piece of the stream of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ModelCard(msgspec.Struct):
    """What is served under a name."""

    id: str
    created: int
    max_model_len: int
    scheme: str
    device: str
    dtype: str
    kv_dtype: str
    kernels: list[str]
    chat_template: bool
    object: Literal["model"] = "model"
    owned_by: Literal["quantlab"] = "quantlab"


class ModelList(msgspec.Struct):
    """The answer of /v1/models."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct):
    """The answer of /detokenize."""

    prompt: str


class Status(msgspec.Struct):
    """The answer of /health and /ready: `status` is the server's phase, `detail` why it is not what it should be."""

    status: str
    detail: str | None = None


class Version(msgspec.Struct):
    """The answer of /version."""

    version: str


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """The answer with `body`."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


BODIES: tuple[type[msgspec.Struct], ...] = (
    Completion,
    ChatCompletion,
    ChatChunk,
    ModelCard,
    ModelList,
    Tokenized,
    Detokenized,
    Status,
    Version,
)
