"""A process for work on what strangers send, which may take for ever: chat templates rendered, schemas compiled.

Run as `python -m quantlab.server.sandbox_process FD`, FD one end of a socket pair. The first message says which work;
then one answer to each message. It limits its own memory, writes no file, and ends when the other side closes; the
other side kills it when it is late. Imports neither torch nor transformers. Knows nothing about HTTP or engines.
"""

import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from quantlab.chat_template import ChatTemplate, TemplateSource
from quantlab.errors import QuantlabError
from quantlab.runtime.grammar import TokenGrammars
from quantlab.runtime.request import Grammar
from quantlab.server.messages import LENGTH, Failed, failure, frame_length

MEMORY: Final = 2 << 30  # of address space: the tokenizer of a grammar takes some 200 MB


class UseTemplate(msgspec.Struct, tag="use_template", frozen=True):
    """The first message: render this template."""

    source: str
    special_tokens: dict[str, str]


class UseGrammars(msgspec.Struct, tag="use_grammars", frozen=True):
    """The first message: compile grammars for this model."""

    folder: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Render(msgspec.Struct, tag="render", frozen=True):
    """Make a prompt of messages."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    extra: dict[str, Any]


class Check(msgspec.Struct, tag="check", frozen=True):
    """Compile a grammar."""

    grammar: Grammar


class Done(msgspec.Struct, tag="done", frozen=True):
    """The work is done; a prompt, when it was to make one."""

    text: str = ""


Use = UseTemplate | UseGrammars
Work = Render | Check
Answer = Done | Failed
Worker = Callable[[Any], str]
ENCODER: Final = msgspec.msgpack.Encoder()
USES: Final = msgspec.msgpack.Decoder(Use)
WORKS: Final = msgspec.msgpack.Decoder(Work)
ANSWERS: Final = msgspec.msgpack.Decoder(Answer)


def encode(message: Use | Work | Answer) -> bytes:
    """The bytes of one message on the wire; raises UnicodeEncodeError for half a surrogate pair."""
    body = ENCODER.encode(message)
    return LENGTH.pack(len(body)) + body


def main(descriptor: str) -> None:
    """Answer until the other side closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front process decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    _limit()
    with socket.socket(fileno=int(descriptor)) as connection, connection.makefile("rb") as stream:
        first = _read(stream)
        if first is None:
            return
        worker = _answered(connection, lambda: _worker(USES.decode(first)))
        while worker is not None and (body := _read(stream)) is not None:
            _answered(connection, lambda body=body: worker(WORKS.decode(body)))  # type: ignore[misc]


def _limit() -> None:
    """No file can be written, none of it swapped out into a core, memory has an end."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _read(stream: Any) -> bytes | None:
    """The body of the next message, None at the end of the stream."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    body: bytes = stream.read(length := frame_length(header))
    return body if len(body) == length else None


def _answered(connection: socket.socket, work: Callable[[], Any]) -> Any:
    """Do `work`, tell how it went, return what it gave; None after a failure."""
    try:
        result = work()
        answer = encode(Done(result if isinstance(result, str) else ""))
    except (QuantlabError, UnicodeError, MemoryError) as error:
        result, answer = None, encode(failure(error))
    connection.sendall(answer)
    return result


def _worker(use: Use) -> Worker:
    """What answers the works that follow; raises what is wrong with `use`."""
    if isinstance(use, UseTemplate):
        template = ChatTemplate(TemplateSource(use.source, use.special_tokens))
        return lambda work: template.render(
            work.messages, work.add_generation_prompt, work.continue_final_message, work.extra
        )
    grammars = TokenGrammars(Path(use.folder), use.vocab_size, use.eos_token_ids)
    grammars.prepare()

    def check(work: Check) -> str:
        grammars.check(work.grammar)
        return ""

    return check


if __name__ == "__main__":
    main(sys.argv[1])
