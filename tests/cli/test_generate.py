"""`quantlab generate`: text on stdout as the model writes it, prompts from anywhere, mistakes in a line."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli.generate import write
from quantlab.llm import LLM
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import SamplingParams

WORDS = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def texts(books_5m: Path) -> dict[str, str]:
    """What the model says, asked through the library."""
    prompts = ["It was a dark and", "Call me"]
    llm = LLM(books_5m, EngineOptions(device="cpu", kv_memory=1 << 24))
    found = llm.generate(prompts, SamplingParams(12, temperature=0))
    return {prompt: each.text for prompt, each in zip(prompts, found, strict=True)}


def test_a_continuation_is_all_that_stdout_gets(cli: Any, books_5m: Path, texts: dict[str, str]) -> None:
    ran = cli("generate", books_5m, "--prompt", "It was a dark and", *WORDS)
    assert ran.code == 0
    assert ran.out == texts["It was a dark and"] + "\n"
    assert "12 tokens written" in ran.err
    assert "ended by length" in ran.err


def test_several_prompts_are_told_apart(cli: Any, books_5m: Path, texts: dict[str, str]) -> None:
    words = [word for prompt in texts for word in ("--prompt", prompt)]
    ran = cli("generate", books_5m, *words, *WORDS)
    assert ran.out == "".join(f"--- {prompt}\n{text}\n" for prompt, text in texts.items())


def test_json_has_a_line_a_prompt_and_nothing_else(cli: Any, books_5m: Path, texts: dict[str, str]) -> None:
    words = [word for prompt in texts for word in ("--prompt", prompt)]
    ran = cli("generate", books_5m, *words, *WORDS, "--json")
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert {line["prompt"]: line["text"] for line in lines} == texts
    assert all(line["completion_tokens"] == len(line["token_ids"]) == 12 for line in lines)
    assert ran.err == ""


def test_a_prompt_comes_from_a_file_or_from_standard_input(
    cli: Any, books_5m: Path, texts: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompt.txt").write_text("Call me")
    assert cli("generate", books_5m, "--prompt-file", "prompt.txt", *WORDS).out == texts["Call me"] + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Call me")))
    assert cli("generate", books_5m, "--prompt-file", "-", *WORDS).out == texts["Call me"] + "\n"


def test_a_stop_string_and_a_seed_are_heeded(cli: Any, books_5m: Path, texts: dict[str, str]) -> None:
    text = texts["It was a dark and"]
    ran = cli("generate", books_5m, "--prompt", "It was a dark and", *WORDS, "--stop", text[5:8])
    assert ran.out == text[: text.index(text[5:8])] + "\n"
    assert "ended by stop" in ran.err
    seeded = [cli("generate", books_5m, "--prompt", "The", "--seed", "3", "-n", "12").out for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_a_message_is_put_in_the_models_template(cli: Any, books_5m: Path, texts: dict[str, str], here: Path) -> None:
    shutil.copytree(books_5m, "model")
    Path("model/chat_template.jinja").write_text("{{ messages[0].content }}")
    assert cli("generate", "model", "--chat", "--prompt", "Call me", *WORDS).out == texts["Call me"] + "\n"
    ran = cli("generate", books_5m, "--chat", "--prompt", "Call me")
    assert (ran.code, ran.out, len(ran.lines)) == (4, "", 1)


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    write("a\x1b[31m\tb\n", terminal=True)
    write("a\x1b[31m\tb\n", terminal=False)
    assert capsys.readouterr().out == "a\ufffd[31m\tb\na\x1b[31m\tb\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "nothing to continue"),
        (["--prompt", ""], 2, "empty prompt"),
        (["--prompt-file", "nowhere.txt"], 2, "nowhere.txt: cannot be read: No such file"),
        (["--prompt-file", "latin.txt"], 2, "not UTF-8"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
        (["--prompt", "a", "--max-tokens", "0"], 2, "--max-tokens"),
        (["--prompt", "a", "--max-model-len", "100000"], 2, "--max-model-len"),
        (["--prompt", "word " * 3000], 2, "the longest that can be continued here"),
        (["--prompt", "a", "--kv-memory", "lots"], 2, "not a size"),
        (["--prompt", "a", "--stop", "x", "--stop", ""], 2, "--stop: is empty"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: int, message: str, cli: Any, books_5m: Path, here: Path) -> None:
    (here / "latin.txt").write_bytes(b"caf\xe9")
    ran = cli("generate", books_5m, *words)
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.lines) == 1
    assert message in ran.err


def test_a_folder_that_is_no_model_is_one_line(cli: Any, here: Path) -> None:
    ran = cli("generate", "nowhere", "--prompt", "a")
    assert (ran.code, len(ran.lines)) == (4, 1)
