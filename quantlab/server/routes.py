"""The routes: each checks its body's shape by type, hands it on and returns what comes back.

Knows nothing about engines.
"""

from fastapi import FastAPI
from starlette.responses import Response

from quantlab import __version__
from quantlab.server.chat import chat
from quantlab.server.completions import complete
from quantlab.server.documents import GENERATES, READS_A_BODY, answers, answers_status, answers_text
from quantlab.server.page_files import HEADERS, Asset, assets
from quantlab.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from quantlab.server.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Detokenized,
    ModelCard,
    ModelList,
    Status,
    Tokenized,
    Version,
    json_response,
)
from quantlab.server.service import REASONS, Service
from quantlab.server.streaming import Answer, EventStream
from quantlab.server.tokens import detokenize, tokenize


def add_generation(app: FastAPI, service: Service) -> None:
    """The routes that give text."""

    @app.post("/v1/completions", responses=answers(Completion, *GENERATES, streamed=Completion))
    async def completions(body: CompletionBody) -> Response:
        """Continue prompts."""
        return (EventStream if body.stream else Answer)(complete(service, body))

    @app.post("/v1/chat/completions", responses=answers(ChatCompletion, *GENERATES, streamed=ChatChunk))
    async def chat_completions(body: ChatBody) -> Response:
        """Answer a conversation."""
        return (EventStream if body.stream else Answer)(chat(service, body))


def add_models(app: FastAPI, service: Service) -> None:
    """The routes that say what is served."""

    @app.get("/v1/models", responses=answers(ModelList, 503))
    async def models() -> Response:
        """What is served."""
        return json_response(ModelList([model_card(service, name) for name in service.options.names]))

    @app.get("/v1/models/{model:path}", responses=answers(ModelCard, 404, 503))
    async def model(model: str) -> Response:
        """What is served under one name."""
        return json_response(model_card(service, service.check_model(model)))


def add_tokens(app: FastAPI, service: Service) -> None:
    """The routes between text and token ids."""

    @app.post("/tokenize", responses=answers(Tokenized, *READS_A_BODY))
    async def text_to_tokens(body: TokenizeBody) -> Response:
        """A text, or messages, as token ids."""
        return json_response(await tokenize(service, body))

    @app.post("/detokenize", responses=answers(Detokenized, *READS_A_BODY))
    async def tokens_to_text(body: DetokenizeBody) -> Response:
        """Token ids as text."""
        return json_response(detokenize(service, body))


def add_state(app: FastAPI, service: Service) -> None:
    """The routes that say how the server is."""

    @app.get("/health", responses=answers_status())
    async def health() -> Response:
        """Whether the server is alive: loading, working and draining are; without an engine it is not."""
        phase = service.condition()
        return json_response(Status(phase, REASONS.get(phase)), 503 if phase in ("dead", "restarting") else 200)

    @app.get("/ready", responses=answers_status())
    async def ready() -> Response:
        """Whether the server takes work."""
        phase = service.condition()
        return json_response(Status(phase, REASONS.get(phase)), 200 if phase == "ready" else 503)

    @app.get("/version", responses=answers(Version))
    async def version() -> Response:
        """The version of quantlab."""
        return json_response(Version(__version__))

    @app.get("/metrics", responses=answers_text())
    async def metrics() -> Response:
        """Counts in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_page(app: FastAPI) -> None:
    """The page and its files."""
    for path, asset in assets().items():
        _add_file(app, path, asset)


def _add_file(app: FastAPI, path: str, asset: Asset) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(asset.content, media_type=asset.media_type, headers=HEADERS)


def model_card(service: Service, name: str) -> ModelCard:
    """What is served under `name`; raises ApiError 503 before anything is."""
    info = service.known_info()
    return ModelCard(
        name,
        service.created,
        info.max_model_len,
        info.scheme,
        info.device,
        info.dtype,
        info.kv_dtype,
        list(info.kernels),
        chat_template=service.strangers.can_chat,
    )
