"""/v1/chat/completions: a conversation through the model's template to an answer, streamed or whole.

Knows nothing about HTTP or engines.
"""

from collections.abc import AsyncGenerator, Sequence

import msgspec

from quantlab.runtime.options import EngineInfo
from quantlab.server.choice import Piece, Prompt, Token
from quantlab.server.completion_writer import finite
from quantlab.server.completions import read_text
from quantlab.server.generation import Asked, Generation, begun
from quantlab.server.protocol import ChatBody, Message
from quantlab.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from quantlab.server.sampling import chat_params
from quantlab.server.service import Service
from quantlab.server.streaming import event
from quantlab.server.texts import Texts


async def chat(service: Service, body: ChatBody) -> AsyncGenerator[bytes, None]:
    """The answer as one body, or as events when the client streams; raises ApiError."""
    model = service.check_model(body.model)
    _, info = service.working()
    asked = Asked(body, "chatcmpl", chat_params(body, info, service.options.engine), None)

    async def read(info: EngineInfo) -> list[Prompt]:
        text = await render(service, body)
        return [Prompt(0, await read_text(service.texts, text, info, special_tokens=False), text)]

    async with begun(service, asked, 1, read) as generation:
        writer = ChatWriter(service.texts, body.logprobs is True)
        if not body.stream:
            yield msgspec.json.encode(await _whole(generation, writer, model))
            return
        async for pieces in generation.pieces():
            for piece in pieces:
                yield event(_chunk(generation, model, [writer.write(piece)], None))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event(_chunk(generation, model, [], generation.usage()))


async def _whole(generation: Generation, writer: "ChatWriter", model: str) -> ChatCompletion:
    written: list[list[ChunkChoice]] = [[] for _ in generation.choices]
    async for pieces in generation.pieces():
        for piece in pieces:
            written[piece.choice.index].append(writer.write(piece))
    choices = [joined(parts) for parts in written]
    return ChatCompletion(generation.id, generation.created, model, choices, generation.usage())


def _chunk(generation: Generation, model: str, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
    return ChatChunk(generation.id, generation.created, model, choices, usage)


async def render(service: Service, body: ChatBody) -> str:
    """The prompt that the conversation makes; raises ApiError where there is no template, or it refuses."""
    going_on = body.continue_final_message is True
    begins = body.add_generation_prompt if body.add_generation_prompt is not None else not going_on
    messages = [plain(message) for message in body.messages]
    return await service.strangers.render(messages, begins, going_on, body.chat_template_kwargs or {})


def plain(message: Message) -> dict[str, object]:
    """A message as templates know it; few know OpenAI's newer name of the system role."""
    role = "system" if message.role == "developer" else message.role
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return {"role": role, "content": message.text, **{key: value for key, value in named.items() if value is not None}}


class ChatWriter:
    """Makes the choices of chunks from pieces; the first of a choice says who speaks."""

    def __init__(self, texts: Texts, logprobs: bool):
        self._texts = texts
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def write(self, piece: Piece) -> ChunkChoice:
        """The choice that says `piece`."""
        index = piece.choice.index
        delta = ChatDelta(piece.text) if index in self._begun else ChatDelta(piece.text, "assistant")
        self._begun.add(index)
        logprobs = ChatLogprobs([self._token(token) for token in piece.tokens]) if self._logprobs else None
        return ChunkChoice(index, delta, logprobs, piece.finish_reason, piece.stop_reason)

    def _token(self, token: Token) -> TokenLogprob:
        top = [self._top(token_id, value) for token_id, value in token.logprobs.top]
        chosen = self._top(token.token_id, token.logprobs.logprob)
        return TokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top)

    def _top(self, token_id: int, value: float) -> TopLogprob:
        vocabulary = self._texts.vocabulary
        return TopLogprob(vocabulary.text(token_id), finite(value), list(vocabulary.of(token_id)))


def joined(parts: Sequence[ChunkChoice]) -> ChatChoice:
    """The pieces of a choice as one."""
    known = [part.logprobs for part in parts if part.logprobs is not None]
    logprobs = ChatLogprobs([token for part in known for token in part.content]) if known else None
    text = "".join(part.delta.content or "" for part in parts)
    last = parts[-1]
    return ChatChoice(last.index, ChatMessage(text), logprobs, last.finish_reason, last.stop_reason)
