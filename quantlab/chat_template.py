"""A checkpoint's chat template made text: messages in, a prompt out, with what templates may use and nothing else.

The environment is that of transformers, rendered piece by piece so that the size of what comes out has a limit. A
template is code of strangers: jinja's sandbox keeps it from Python, but not from taking for ever, so a server renders
in a process that it can kill. Knows nothing about processes, tokens or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantlab.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from quantlab.text import Tokenizer

MAX_TEMPLATE_CHARS: Final = 1 << 20
MAX_RENDERED_CHARS: Final = 16 << 20
REASON_CHARS: Final = 400
OWN_NAMES: Final = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"})


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A template's text, and the special tokens that it may name (bos_token, eos_token and the like)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def template_of(tokenizer: Tokenizer) -> TemplateSource | None:
    """The chat template that a tokenizer came with, None without one; of several the one named "default"."""
    backend = tokenizer.backend
    source = backend.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str) or not source:
        return None
    return TemplateSource(source, special_tokens_of(tokenizer))


def special_tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a template of this tokenizer may name."""
    named = tokenizer.backend.special_tokens_map.items()
    return {name: str(token) for name, token in named if isinstance(token, str)}


class ChatTemplate:
    """A compiled template; raises CheckpointError for one that is malformed or too large.

    To compile one is to run it already: jinja computes what is constant, `'x' * 9999999999` included.
    """

    def __init__(self, template: TemplateSource):
        if len(template.source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(f"the chat template is longer than {MAX_TEMPLATE_CHARS} characters")
        try:
            self._template = _environment().from_string(template.source)
        except TemplateSyntaxError as error:
            message = f"the chat template is malformed: line {error.lineno}: {error.message}"
            raise CheckpointError(message[:REASON_CHARS]) from error
        except (TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise CheckpointError(f"the chat template is malformed: {str(error)[:REASON_CHARS]}") from error
        self._special_tokens = dict(template.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages` (role, content, ...), special tokens spelled out; `extra` names are the template's.

        With `continue_final_message` the prompt ends where the last message's content does. Raises UsageError when the
        template refuses the messages, fails on them, or makes too much of them.
        """
        if taken := sorted(OWN_NAMES & set(extra or ())):
            raise UsageError(f"chat_template_kwargs cannot set {', '.join(taken)}")
        if continue_final_message and add_generation_prompt:
            raise UsageError("add_generation_prompt and continue_final_message exclude each other")
        own = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        values = {"tools": None, "documents": None, **self._special_tokens, **(extra or {}), **own}
        text = self._text(values)
        return _until_content(text, messages) if continue_final_message else text

    def _text(self, values: Mapping[str, Any]) -> str:
        parts, length = [], 0
        try:
            for part in self._template.generate(values):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED_CHARS:
                    raise UsageError(f"the chat template makes more than {MAX_RENDERED_CHARS} characters of this")
        except UsageError:
            raise
        except MemoryError as error:
            raise UsageError("the chat template needs too much memory for these messages") from error
        except Exception as error:  # a template can raise whatever Python's operators raise
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise UsageError(f"the chat template refuses these messages: {reason[:REASON_CHARS]}") from error
        return "".join(parts)


def _until_content(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """`text` up to the end of the last message's content; templates may have trimmed that."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str) or not content.strip() or (start := text.rfind(content.strip())) < 0:
        raise UsageError("the chat template does not show the last message as it is, so it cannot be continued")
    kept = content.lstrip() if text.startswith(content.lstrip(), start) else content.strip()
    return text[: start + len(kept)]


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is what is inside it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The nodes between the tags."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)
