"""What strangers send that must not run here: conversations through the chat template, schemas into grammars.

Both go to processes that can be killed; the errors that come back are ApiErrors. Knows nothing about HTTP or engines.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from quantlab.chat_template import TemplateSource
from quantlab.errors import CheckpointError, QuantlabError
from quantlab.log import logger
from quantlab.runtime.options import EngineInfo
from quantlab.runtime.request import Grammar
from quantlab.server.errors import ApiError
from quantlab.server.sandbox import GrammarProcess, SandboxError, TemplateProcess

LOG = logger(__name__)
KNOWN_GRAMMARS: Final = 256
NO_TEMPLATE: Final = "this model has no chat template: use /v1/completions, or serve it with --chat-template FILE"


class Strangers:
    """The two processes of one server; they begin when they are first needed, or with `start`."""

    def __init__(self, folder: Path, template: TemplateSource | None):
        self._folder = folder
        self._template = TemplateProcess(template) if template is not None else None
        self._grammars: GrammarProcess | None = None
        self._sound: OrderedDict[Grammar, None] = OrderedDict()

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def expect(self, info: EngineInfo) -> None:
        """Say what is served; before that no grammar can be checked."""
        self._grammars = self._grammars or GrammarProcess(self._folder, info.vocab_size, info.eos_token_ids)

    async def start(self) -> None:
        """Begin the template's process now; a template that is malformed is told, and chats are refused."""
        if self._template is not None:
            try:
                await self._template.sandbox.start()
            except (CheckpointError, SandboxError) as error:
                LOG.error("chats are refused: %s", error)
                self._template = None

    async def render(
        self, messages: Sequence[Mapping[str, Any]], begins: bool, going_on: bool, extra: Mapping[str, Any]
    ) -> str:
        """The prompt that `messages` make; raises ApiError where there is no template, or it refuses."""
        if self._template is None:
            raise ApiError(400, NO_TEMPLATE, code="no_chat_template", param="messages")
        try:
            return await self._template.render(messages, begins, going_on, extra)
        except QuantlabError as error:
            raise ApiError(400, error.message, code="invalid_value", param="messages") from error
        except SandboxError as error:
            raise ApiError(503, str(error), code="overloaded", retry_after=1) from error

    async def check(self, grammar: Grammar) -> None:
        """Raises ApiError for a grammar that the engine must not see."""
        assert self._grammars is not None
        if grammar in self._sound:
            self._sound.move_to_end(grammar)
            return
        try:
            await self._grammars.check(grammar)
        except QuantlabError as error:
            raise ApiError(400, error.message, code="invalid_schema", param="response_format") from error
        except SandboxError as error:
            raise ApiError(503, str(error), code="overloaded", retry_after=1) from error
        self._sound[grammar] = None
        if len(self._sound) > KNOWN_GRAMMARS:
            self._sound.popitem(last=False)

    async def close(self) -> None:
        """End both processes."""
        for process in (self._template, self._grammars):
            if process is not None:
                await process.sandbox.close()
