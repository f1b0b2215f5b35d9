"""Templates and schemas in a process that can be killed: what is late ends, what comes next is served."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from quantlab.chat_template import ChatTemplate, TemplateSource
from quantlab.errors import CheckpointError, GrammarError, QuantlabError, UnsupportedModel, UsageError
from quantlab.runtime.request import Grammar
from quantlab.server import sandbox as module
from quantlab.server.sandbox import GrammarProcess, Sandbox, SandboxError, TemplateProcess
from tests.tokenizers_at_hand import word_piece

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = TemplateSource(
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.content == 'hang' %}" + LOOP + "{% endif %}"
    "{% if m.content == 'swell' %}{{ ('x' * (m.content | length * 2000000000)) | length }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{{ extra | default('') }}",
    {"bos_token": "<s>"},
)


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def with_template(
    use: Callable[[TemplateProcess], Awaitable[None]], template: TemplateSource = TEMPLATE, seconds: float = 30.0
) -> None:
    async def run() -> None:
        process = TemplateProcess(template, seconds)
        try:
            await use(process)
        finally:
            await process.sandbox.close()

    asyncio.run(run())


def pid(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    return sandbox._process.pid


def test_a_prompt_is_the_one_that_the_template_makes() -> None:
    async def use(process: TemplateProcess) -> None:
        talk = [*said("日本 \U0001f600"), {"role": "assistant", "content": "yes"}]
        own = ChatTemplate(TEMPLATE)
        assert await process.render(talk) == own.render(talk)
        assert await process.render(talk, extra={"extra": [1, {"a": None}]}) == own.render(
            talk, extra={"extra": [1, {"a": None}]}
        )
        assert await process.render(talk, False, True) == own.render(talk, False, True)

    with_template(use)


def test_ctrl_c_in_a_terminal_is_not_the_sandboxs_to_hear() -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        assert os.getpgid(pid(process.sandbox)) != os.getpgid(0)

    with_template(use)


def test_a_template_that_takes_too_long_is_killed_and_the_next_prompt_is_made() -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        before = pid(process.sandbox)
        with pytest.raises(UsageError, match=r"more than 0\.5 s"):
            await process.render(said("hang"))
        assert not Path(f"/proc/{before}").exists()
        process.sandbox._work_seconds = 30.0
        assert await process.render(said("still here")) == "<s>user: still here\n"

    with_template(use, seconds=0.5)


def test_a_template_that_wants_too_much_memory_is_refused() -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        before = pid(process.sandbox)
        with pytest.raises(UsageError, match="memory"):
            await process.render(said("swell"))
        assert await process.render(said("still here")) == "<s>user: still here\n"
        assert pid(process.sandbox) == before, "without being killed"

    with_template(use)


def test_a_template_that_wants_too_much_memory_when_it_is_compiled_is_refused() -> None:
    """jinja computes what is constant once, at the start: that, too, must not happen in the server."""

    async def use(process: TemplateProcess) -> None:
        with pytest.raises(QuantlabError):
            await process.render(said("x"))

    with_template(use, TemplateSource("{{ ('x' * 9999999999) | length }}"))


def test_refusals_and_faults_of_the_template_come_back_as_they_are() -> None:
    async def refuse(process: TemplateProcess) -> None:
        with pytest.raises(UsageError, match="refuses these messages: no thanks"):
            await process.render(said("x"))
        with pytest.raises(UsageError, match="surrogate"):
            await process.render(said("\ud83d"))

    async def start(process: TemplateProcess) -> None:
        with pytest.raises(CheckpointError, match="malformed: line 2"):
            await process.sandbox.start()
        with pytest.raises(CheckpointError):
            await process.render(said("x"))

    with_template(refuse, TemplateSource("{{ raise_exception('no thanks') }}"))
    with_template(start, TemplateSource("{{ 1 }}\n{% for %}"))


def test_many_at_once_each_get_their_own() -> None:
    async def use(process: TemplateProcess) -> None:
        texts = await asyncio.gather(*(process.render(said(str(i))) for i in range(100)))
        assert texts == [f"<s>user: {i}\n" for i in range(100)]

    with_template(use)


def test_who_leaves_takes_nobody_elses_answer() -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        for i in range(20):
            leaving = asyncio.ensure_future(process.render(said("leaving")))
            await asyncio.sleep(0.0005 * (i % 4))
            leaving.cancel()
            assert await process.render(said(str(i))) == f"<s>user: {i}\n"

    with_template(use)


def test_too_many_that_wait_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)

    async def use(process: TemplateProcess) -> None:
        outcomes = await asyncio.gather(*(process.render(said("x")) for _ in range(5)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [str] * 3 + [SandboxError] * 2
        assert await process.render(said("x")) == "<s>user: x\n"

    with_template(use)


def test_a_process_that_is_killed_is_started_again() -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        os.kill(pid(process.sandbox), signal.SIGKILL)
        while process.sandbox._process is not None and process.sandbox._process.poll() is None:
            await asyncio.sleep(0.01)
        assert await process.render(said("a")) == "<s>user: a\n"
        working = asyncio.ensure_future(process.render(said("hang")))
        await asyncio.sleep(0.3)
        os.kill(pid(process.sandbox), signal.SIGKILL)
        with pytest.raises(SandboxError, match="in the middle"):
            await working
        assert await process.render(said("b")) == "<s>user: b\n"

    with_template(use)


def test_the_process_sees_no_secret_writes_no_file_and_ends_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_API_KEY", "secret")

    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        here = Path(f"/proc/{pid(process.sandbox)}")
        assert b"secret" not in (here / "environ").read_bytes()
        limits = {line[:20].strip(): line[20:].split()[:2] for line in (here / "limits").read_text().splitlines()}
        assert limits["Max file size"] == ["0", "0"] and limits["Max address space"] == [str(2 << 30)] * 2
        assert "torch" not in (here / "maps").read_text()
        # As when we die: the other end closes.
        popen, writer = process.sandbox._process, process.sandbox._writer
        assert popen is not None and writer is not None
        writer.close()
        assert await asyncio.to_thread(popen.wait, 20) == 0

    with_template(use)


def test_a_schema_is_compiled_where_it_can_be_killed(books_5m: Path) -> None:
    """Nothing in the grammar library ends the second one before minutes have passed."""

    async def run() -> None:
        process = GrammarProcess(books_5m, 8192, [2])
        await process.check(Grammar("json_schema", '{"type": "integer", "multipleOf": 7}'))
        await process.check(Grammar("json_object"))
        with pytest.raises(GrammarError, match="wat"):
            await process.check(Grammar("json_schema", '{"type": "wat"}'))
        with pytest.raises(UsageError, match="took more than 2 s"):
            await process.check(Grammar("json_schema", '{"type": "integer", "multipleOf": 99999971}'))
        await process.check(Grammar("json_object"))
        await process.sandbox.close()

    asyncio.run(run())


def test_a_tokenizer_without_grammars_is_told(tmp_path: Path) -> None:
    word_piece(tmp_path)

    async def run() -> None:
        process = GrammarProcess(tmp_path, 20, [2])
        for _ in range(2):
            with pytest.raises(UnsupportedModel, match="cannot be used"):
                await process.check(Grammar("json_object"))
        await process.sandbox.close()

    asyncio.run(run())


def test_what_is_no_message_ends_the_process_and_not_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(process: TemplateProcess) -> None:
        await process.sandbox.start()
        with pytest.raises(SandboxError):
            await process.sandbox._exchange(b"\x00\x00\x00\x01\xc1")
        assert await process.render(said("a")) == "<s>user: a\n"

    with_template(use)


def test_a_sandbox_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))

    async def use(process: TemplateProcess) -> None:
        with pytest.raises(SandboxError, match="did not start"):
            await process.render(said("a"))

    with_template(use)


def test_the_process_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic'}"
    code = f"import sys, quantlab.server.sandbox_process; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert not issubclass(SandboxError, QuantlabError), "it is for the log and a 503, never an exit code"
