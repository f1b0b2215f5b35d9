"""One request on a real socket: what is timed, what is counted, and what each failure is called."""

import asyncio
from time import perf_counter
from typing import Any

import pytest

from quantlab.bench.serve_client import Outcome, ask, new_session
from quantlab.bench.serve_options import Target
from tests.bench.openai_script import Script, serving

PROMPT = "one two three four"


def asked(script: Script, chat: bool = False, key: str | None = None, timeout: float = 20.0) -> Outcome:
    """The outcome of one request for six tokens."""

    async def run() -> Outcome:
        target = Target(script.url, api="chat" if chat else "completions", api_key=key, timeout=timeout)
        body: dict[str, Any] = {"model": "scripted", "max_tokens": 6, "stream": True}
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
        async with new_session(target) as session:
            return await ask(session, target, body, perf_counter())

    return asyncio.run(run())


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_timed_and_tokens_are_the_servers_count(chat: bool) -> None:
    with serving(Script(first=0.08, gap=0.02)) as script:
        outcome = asked(script, chat)
    assert outcome.failure is None
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (11, 6, 2)
    assert (outcome.pieces, len(outcome.gaps), outcome.counted) == (6, 5, True)
    # A chat's first event names the role and shows nothing: the first token is the first text.
    assert outcome.ttft is not None and outcome.ttft >= 0.08
    assert min(outcome.gaps) >= 0.015
    assert outcome.e2e == pytest.approx(outcome.ttft + sum(outcome.gaps))
    assert outcome.tpot == pytest.approx(sum(outcome.gaps) / 5)


def test_latency_counts_from_when_the_request_was_due() -> None:
    async def run(script: Script) -> Outcome:
        target = Target(script.url)
        async with new_session(target) as session:
            return await ask(session, target, {"prompt": PROMPT, "max_tokens": 1}, perf_counter() - 5.0)

    with serving(Script()) as script:
        outcome = asyncio.run(run(script))
    assert outcome.ttft is not None and outcome.ttft > 5.0 and outcome.sent - outcome.due >= 5.0


def test_without_usage_tokens_are_pieces_of_text() -> None:
    with serving(Script(usage=False)) as script:
        outcome = asked(script)
    assert (outcome.output_tokens, outcome.counted, outcome.failure) == (6, False, None)


def test_events_that_the_network_cuts_are_put_together_again() -> None:
    with serving(Script(fail={0: "halves"})) as script:
        outcome = asked(script)
    assert (outcome.pieces, outcome.failure) == (6, None)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("429", "HTTP 429: the queue is full"),
        ("500", "HTTP 500: the queue is full"),
        ("plain", "not a stream but application/json"),
        ("drop", "connection lost"),
        ("broken", "stream: an event that is no JSON"),
        ("error", "stream: the engine died"),
        ("endless", "stream: ended without [DONE]"),
    ],
)
def test_a_failure_has_a_name(what: str, name: str) -> None:
    with serving(Script(fail={0: what})) as script:
        assert asked(script).failure == name


def test_silence_is_a_failure_too() -> None:
    with serving(Script(first=5.0)) as script:
        assert asked(script, timeout=0.2).failure == "timed out"


def test_an_answer_without_text_is_a_failure() -> None:
    async def run(script: Script) -> Outcome:
        target = Target(script.url)
        async with new_session(target) as session:
            return await ask(session, target, {"prompt": PROMPT, "max_tokens": 0}, perf_counter())

    with serving(Script()) as script:
        assert asyncio.run(run(script)).failure == "stream: had no text"


def test_nobody_there() -> None:
    outcome = asked(Script(url="http://127.0.0.1:9/v1"))
    assert outcome.failure is not None and outcome.failure.startswith("cannot connect: ")
    assert "127.0.0.1" not in outcome.failure  # the same failure of other addresses counts with it


def test_the_key_is_sent_and_never_shown() -> None:
    with serving(Script(key="s3cret")) as script:
        assert asked(script).failure == "HTTP 401: wrong key"
        assert asked(script, key="s3cret").failure is None
    assert "s3cret" not in repr(Target("http://127.0.0.1/v1", api_key="s3cret"))
