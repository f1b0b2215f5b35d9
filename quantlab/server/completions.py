"""/v1/completions: prompts as text or ids to texts, streamed or whole.

Knows nothing about HTTP or engines.
"""

from collections.abc import AsyncGenerator

import msgspec

from quantlab.runtime.options import EngineInfo
from quantlab.server.choice import Prompt
from quantlab.server.completion_writer import CompletionWriter, joined
from quantlab.server.errors import ApiError
from quantlab.server.generation import Asked, Generation, begun
from quantlab.server.protocol import CompletionBody
from quantlab.server.responses import Completion, CompletionChoice, Usage
from quantlab.server.sampling import COMPLETION_TOKENS, check_tokens, completion_params
from quantlab.server.service import Service
from quantlab.server.streaming import event
from quantlab.server.texts import Texts


async def complete(service: Service, body: CompletionBody) -> AsyncGenerator[bytes, None]:
    """The answer as one body, or as events when the client streams; raises ApiError."""
    model = service.check_model(body.model)
    _, info = service.working()
    asked = Asked(body, "cmpl", completion_params(body, info, service.options.engine), COMPLETION_TOKENS)
    writer = CompletionWriter(service.texts, body)

    async def read(info: EngineInfo) -> list[Prompt]:
        return await read_prompts(service.texts, body, info)

    async with begun(service, asked, len(prompts_of(body)), read) as generation:
        if not body.stream:
            yield msgspec.json.encode(await _whole(generation, writer, model))
            return
        async for pieces in generation.pieces():
            for piece in pieces:
                yield event(_completion(generation, model, [writer.write(piece)], None))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(_completion(generation, model, [], generation.usage()))


async def _whole(generation: Generation, writer: CompletionWriter, model: str) -> Completion:
    written: list[list[CompletionChoice]] = [[] for _ in generation.choices]
    async for pieces in generation.pieces():
        for piece in pieces:
            written[piece.choice.index].append(writer.write(piece))
    return _completion(generation, model, [joined(parts) for parts in written], generation.usage())


def _completion(generation: Generation, model: str, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
    return Completion(generation.id, generation.created, model, choices, usage)


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The prompts, each a text or a list of ids."""
    match body.prompt:
        case str(text):
            return [text]
        case [int(), *_] as ids:
            return [ids]  # type: ignore[list-item]  # the body's type says that all are ids
        case several:
            return several  # type: ignore[return-value]


async def read_prompts(texts: Texts, body: CompletionBody, info: EngineInfo) -> list[Prompt]:
    """The prompts as ids; raises ApiError for one that is empty, or that no answer fits behind."""
    prompts = []
    for index, given in enumerate(prompts_of(body)):
        if isinstance(given, str):
            prompts.append(Prompt(index, await read_text(texts, given, info), given))
        else:
            check_tokens(given, info, "prompt")
            text = texts.decode(given, body.skip_special_tokens is not False) if body.echo else ""
            prompts.append(Prompt(index, tuple(given), text))
    return prompts


async def read_text(texts: Texts, text: str, info: EngineInfo, special_tokens: bool = True) -> tuple[int, ...]:
    """The ids of `text`; raises ApiError for a text without any, or with far more than the model's length."""
    if (least := texts.least_tokens(text)) > info.max_model_len:
        message = f"this model's length is {info.max_model_len} tokens, but the prompt has more than {least}"
        raise ApiError(400, message, code="context_length_exceeded", param="prompt")
    ids = await texts.encode(text, special_tokens)
    if not ids:
        raise ApiError(400, "the prompt is empty", code="invalid_value", param="prompt")
    return tuple(ids)
