"""The state that all routes share: what is served, whether it takes work, and the parts that do the work.

Knows nothing about HTTP; errors are ApiErrors, which know their status.
"""

import time
from pathlib import Path
from typing import Literal

from quantlab.chat_template import MAX_TEMPLATE_CHARS, TemplateSource, special_tokens_of, template_of
from quantlab.errors import EngineDied, QuantlabError, UsageError
from quantlab.runtime.options import EngineInfo, EngineStats
from quantlab.server.admission import Admission
from quantlab.server.engine_client import EngineClient
from quantlab.server.errors import ApiError
from quantlab.server.metrics import Metrics
from quantlab.server.options import ServeOptions
from quantlab.server.strangers import Strangers
from quantlab.server.texts import Texts, load_texts

Phase = Literal["loading", "ready", "restarting", "draining", "dead"]
REASONS: dict[Phase, str] = {
    "loading": "the model is being loaded",
    "restarting": "the engine died and is being started again",
    "draining": "the server is shutting down",
    "dead": "the engine died",
}
COME_AGAIN = 5


class Service:
    """One server's state; `phase` is changed by the lifecycle alone."""

    def __init__(self, options: ServeOptions, texts: Texts, strangers: Strangers):
        self.options = options
        self.texts = texts
        self.strangers = strangers
        self.phase: Phase = "loading"
        self.engine: EngineClient | None = None
        self.created = int(time.time())
        self.metrics = Metrics(options.names[0])
        self.admission = Admission(options.queue, self.stats, time.monotonic)
        self.metrics.observe_engine(self.stats, self.live_info)

    def stats(self) -> EngineStats:
        """The engine's counts as it last told them."""
        return self.engine.stats if self.engine is not None else EngineStats()

    def live_info(self) -> EngineInfo | None:
        """What the engine is, while it takes work."""
        return self.engine.info if self.engine is not None and self.engine.alive else None

    def known_info(self) -> EngineInfo:
        """What is served, also while the engine is away; raises ApiError 503 before it was there once."""
        if self.engine is None or self.engine.info is None:
            raise ApiError(503, REASONS["loading"], code="loading", retry_after=COME_AGAIN)
        return self.engine.info

    def condition(self) -> Phase:
        """The phase, and "dead" from the moment that an engine is: the lifecycle notices a little later."""
        return "dead" if self.phase == "ready" and self.live_info() is None else self.phase

    def working(self) -> tuple[EngineClient, EngineInfo]:
        """The engine and what it is; raises ApiError 503 when it takes no work."""
        engine, info, phase = self.engine, self.live_info(), self.condition()
        if phase != "ready" or engine is None or info is None:
            raise ApiError(503, REASONS[phase], code=phase, retry_after=COME_AGAIN)
        return engine, info

    def check_model(self, name: str | None) -> str:
        """The name to answer under; raises ApiError 404 for one that is not served."""
        if name is None:
            return self.options.names[0]
        if name not in self.options.names:
            message = f"the model '{name}' is not served here (served: {', '.join(self.options.names)})"
            raise ApiError(404, message, code="model_not_found", param="model")
        return name

    def told(self, error: QuantlabError) -> ApiError:
        """The answer to a request whose engine ended: shutting down is no fault of the engine's."""
        if self.phase == "draining":
            return ApiError(503, REASONS["draining"], code="draining", retry_after=COME_AGAIN)
        code = "engine_died" if isinstance(error, EngineDied) else "engine_error"
        return ApiError(500, error.message, code=code)


def load_service(options: ServeOptions) -> Service:
    """The service of the folder in `options`, without its engine; raises CheckpointError for its tokenizer, UsageError
    for a chat template that cannot be read."""
    texts = load_texts(options.folder)
    template = template_of(texts.tokenizer)
    if options.chat_template is not None:
        template = TemplateSource(_read(options.chat_template), special_tokens_of(texts.tokenizer))
    return Service(options, texts, Strangers(options.folder, template))


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_TEMPLATE_CHARS:
            raise UsageError(f"the chat template is larger than {MAX_TEMPLATE_CHARS} bytes", where=str(file))
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"cannot read the chat template: {reason}", where=str(file)) from error
