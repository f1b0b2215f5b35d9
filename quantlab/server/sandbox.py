"""The front process's side of a sandbox process: one work at a time, each with a time limit, killed when it is late.

A process that was killed or that died is started again for the next work. Knows nothing about HTTP, nor about what the
work is.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from quantlab.chat_template import TemplateSource
from quantlab.errors import QuantlabError, UsageError
from quantlab.log import environment, logger
from quantlab.runtime.request import Grammar
from quantlab.server.messages import LENGTH, Failed, frame_length, raised
from quantlab.server.sandbox_process import (
    ANSWERS,
    Answer,
    Check,
    Render,
    Use,
    UseGrammars,
    UseTemplate,
    Work,
    encode,
)

LOG = logger(__name__)
COMMAND: Final = (sys.executable, "-m", "quantlab.server.sandbox_process")
# What is in the environment may be secret; this is what Python itself needs to find us.
ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "SYSTEMROOT", "TZ")
WORK_SECONDS: Final = 2.0
START_SECONDS: Final = 60.0  # Python, jinja, and the tokenizer of a grammar
MAX_WAITING: Final = 256


class SandboxError(Exception):
    """The sandbox could not do its work, for no fault of what it was given."""


class Sandbox:
    """One sandbox process for one kind of work, begun with `use`."""

    def __init__(self, use: Use, work_seconds: float = WORK_SECONDS):
        self._use = use
        self._environment = {name: value for name in ENVIRONMENT if (value := environment(name)) is not None}
        self._work_seconds = work_seconds
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        """Begin the process now and not with the first work; raises what is wrong with `use`."""
        async with self._one_at_a_time:
            await self._started()

    async def do(self, work: Work) -> str:
        """What comes of `work`.

        Raises UsageError when it takes too long, the process's own errors, SandboxError when that dies or too many
        wait. A caller that is cancelled leaves the work to its end, so that no answer comes to the wrong one.
        """
        if self._waiting >= MAX_WAITING:
            raise SandboxError("too many requests wait for their chat template or schema")
        try:
            message = encode(work)
        except UnicodeError as error:
            raise UsageError("the text holds half a surrogate pair") from error
        self._waiting += 1
        task = asyncio.ensure_future(self._exchange(message))
        task.add_done_callback(self._one_less)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the process."""
        async with self._one_at_a_time:
            await self._kill()

    def _one_less(self, task: "asyncio.Future[str]") -> None:
        self._waiting -= 1
        if not task.cancelled():
            task.exception()  # whoever asked may have gone

    async def _exchange(self, message: bytes) -> str:
        async with self._one_at_a_time:
            await self._started()
            try:
                return _text(await asyncio.wait_for(self._say(message), self._work_seconds))
            except TimeoutError as error:
                await self._kill()
                LOG.warning("a chat template or schema took more than %g s", self._work_seconds)
                raise UsageError(f"the chat template or schema took more than {self._work_seconds:g} s") from error
            except (EOFError, OSError, ValueError) as error:
                await self._kill()
                raise SandboxError("the sandbox process ended in the middle of its work") from error

    async def _started(self) -> None:
        """A process that has begun with `use`."""
        if self._process is not None and self._process.poll() is None:
            return
        await self._kill()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
                env=self._environment, process_group=0,  # a terminal's Ctrl-C is not for it
            )  # fmt: skip
        ours.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        try:
            _text(await asyncio.wait_for(self._say(encode(self._use)), START_SECONDS))
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            await self._kill()
            raise SandboxError("the sandbox process did not start") from error
        except QuantlabError:
            await self._kill()
            raise

    async def _say(self, message: bytes) -> Answer:
        assert self._reader is not None and self._writer is not None
        self._writer.write(message)
        await self._writer.drain()
        length = frame_length(await self._reader.readexactly(LENGTH.size))
        answer: Answer = ANSWERS.decode(await self._reader.readexactly(length))
        return answer

    async def _kill(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._process = self._reader = self._writer = None


class TemplateProcess:
    """A chat template in a process that can be killed."""

    def __init__(self, template: TemplateSource, work_seconds: float = WORK_SECONDS):
        use = UseTemplate(template.source, dict(template.special_tokens))
        self.sandbox = Sandbox(use, work_seconds)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`; raises UsageError when the template refuses them or takes too long."""
        talk = [dict(message) for message in messages]
        return await self.sandbox.do(Render(talk, add_generation_prompt, continue_final_message, dict(extra or {})))


class GrammarProcess:
    """Grammars of one model, compiled first in a process that can be killed."""

    def __init__(
        self,
        folder: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        work_seconds: float = WORK_SECONDS,
    ):
        self.sandbox = Sandbox(UseGrammars(str(folder), vocab_size, tuple(eos_token_ids)), work_seconds)

    async def check(self, grammar: Grammar) -> None:
        """Raises GrammarError or UsageError for a grammar that the engine must not see, UnsupportedModel where the
        model's tokenizer allows none."""
        await self.sandbox.do(Check(grammar))


def _text(answer: Answer) -> str:
    if isinstance(answer, Failed):
        raise raised(answer)
    return answer.text
