"""From the fields of a request to the engine's sampling parameters; what depends on the model is checked here.

Knows nothing about HTTP or text.
"""

import json
from dataclasses import replace
from typing import Final

from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.runtime.request import Grammar, SamplingParams
from quantlab.server.errors import ApiError
from quantlab.server.protocol import ChatBody, CompletionBody, SamplingBody, SchemaFormat, TextFormat

COMPLETION_TOKENS: Final = 16  # OpenAI's default for /v1/completions; a chat goes on to the model's length
MAX_SCHEMA: Final = 1 << 16
SEEDS: Final = 1 << 63


def completion_params(body: CompletionBody, info: EngineInfo, options: EngineOptions) -> SamplingParams:
    """The parameters of a completion; `max_tokens` None means OpenAI's default, cut to what fits."""
    params = _common(body, info, options)
    scored = body.logprobs if body.echo else None
    return replace(params, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=scored)


def chat_params(body: ChatBody, info: EngineInfo, options: EngineOptions) -> SamplingParams:
    """The parameters of a chat; `max_tokens` None goes on to the model's length."""
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return replace(_common(body, info, options), max_tokens=asked, logprobs=logprobs)


def stop_strings(body: SamplingBody) -> tuple[str, ...]:
    """The strings that end the text."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def for_prompt(params: SamplingParams, tokens: int, default: int | None, info: EngineInfo) -> SamplingParams:
    """`params` for a prompt of `tokens`: what was not asked for is `default`, cut to what fits.

    Raises ApiError, naming both lengths, when prompt and answer are longer than the model's length.
    """
    room = info.max_model_len - tokens
    asked = params.max_tokens
    if room < (1 if asked is None else asked):
        wanted = f"the prompt has {tokens} tokens" + (f" and max_tokens is {asked}" if asked is not None else "")
        message = f"this model's length is {info.max_model_len} tokens, but {wanted}"
        raise ApiError(400, message, code="context_length_exceeded", param="max_tokens" if room > 0 else "prompt")
    limit = asked if asked is not None else min(default or room, room)
    if params.min_tokens > limit:
        message = f"min_tokens {params.min_tokens} is more than the {limit} tokens that there may be"
        raise ApiError(400, message, code="invalid_value", param="min_tokens")
    return replace(params, max_tokens=limit)


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """`params` for choice `index`: with a seed, each choice draws differently, and the same every time."""
    return params if params.seed is None or index == 0 else replace(params, seed=(params.seed + index) % SEEDS)


def priority_of(body: SamplingBody, options: EngineOptions) -> int:
    """The request's priority; raises ApiError where the server does not schedule by it."""
    if body.priority and options.policy != "priority":
        message = "priority is only for a server started with --policy priority"
        raise ApiError(400, message, code="unsupported_parameter", param="priority")
    return body.priority or 0


def _common(body: SamplingBody, info: EngineInfo, options: EngineOptions) -> SamplingParams:
    priority_of(body, options)
    bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
    check_tokens([token for token, _ in bias], info, "logit_bias")
    check_tokens(body.stop_token_ids or [], info, "stop_token_ids")
    return SamplingParams(
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=bias,
        seed=None if body.seed is None else body.seed % SEEDS,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        grammar=_grammar(body),
    )


def check_tokens(tokens: list[int], info: EngineInfo, param: str) -> None:
    """Raises ApiError for a token id that the model does not have."""
    worst = max(tokens, default=0)
    if worst >= info.vocab_size:
        message = f"token {worst} is not one of the model's {info.vocab_size}"
        raise ApiError(400, message, code="invalid_value", param=param)


def _grammar(body: SamplingBody) -> Grammar | None:
    wanted = body.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if not isinstance(wanted, SchemaFormat):
        return Grammar("json_object")
    try:
        schema = json.dumps(wanted.json_schema.schema_, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"the schema is not JSON: {error}", code="invalid_schema", param="response_format"
        ) from error
    if len(schema.encode("utf-8", "replace")) > MAX_SCHEMA:
        message = f"the schema is larger than {MAX_SCHEMA} bytes"
        raise ApiError(400, message, code="invalid_schema", param="response_format")
    return Grammar("json_schema", schema)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
