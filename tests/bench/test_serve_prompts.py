"""What is asked: as long as wanted by the server's own count, the same for the same seed, or as a file has it."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from quantlab.bench.serve_options import Span, Target, Work
from quantlab.bench.serve_prompts import PLACES, PROBES, Rate, probes, read_prompts, requests
from quantlab.errors import TextError
from tests.bench.openai_script import FRAME, TOKENS_PER_WORD

TARGET = Target("http://127.0.0.1/v1")
CHAT = Target("http://127.0.0.1/v1", api="chat")
RATE = Rate(float(FRAME), float(TOKENS_PER_WORD), True)


def first(count: int, work: Work, stream: str = "a", target: Target = TARGET) -> list[Any]:
    return list(islice(requests(target, "m", work, RATE, stream), count))


def tokens(body: Any) -> int:
    """As the scripted tokenizer counts them."""
    return FRAME + TOKENS_PER_WORD * len(body["prompt"].split())


def test_the_rate_is_the_line_through_the_probes() -> None:
    asked = probes(TARGET, "m", Work())
    assert Rate.from_probes([tokens(body) for body in asked]) == RATE
    assert [len(body["prompt"].split()) for body in asked] == [count for count in PROBES for _ in range(PLACES)]
    assert len({body["prompt"] for body in asked}) == 2 * PLACES
    assert {(body["max_tokens"], body["stream"]) for body in asked} == {(1, True)}


@pytest.mark.parametrize("counts", [(0,) * 6, (5,) * 6, (9, 9, 9, 3, 3, 3)])
def test_without_the_servers_counts_the_rate_is_assumed_and_says_so(counts: tuple[int, ...]) -> None:
    assert not Rate.from_probes(counts).measured


def test_lengths_are_those_asked() -> None:
    bodies = first(200, Work(Span(40, 80), Span(5, 9)))
    lengths = [tokens(body) for body in bodies]
    assert min(lengths) in (39, 40, 41) and max(lengths) in (79, 80, 81) and len(set(lengths)) > 15
    assert {body["max_tokens"] for body in bodies} == {5, 6, 7, 8, 9}


def test_the_seed_decides_and_each_stream_draws_others() -> None:
    assert first(5, Work(seed=3)) == first(5, Work(seed=3))
    assert first(5, Work(seed=3)) != first(5, Work(seed=4))
    assert not {body["prompt"] for body in first(20, Work())} & {body["prompt"] for body in first(20, Work(), "b")}


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    bodies = first(12, Work(Span(120, 120), shared_prefix=80))
    words = [body["prompt"].split() for body in bodies]
    shared = round((80 - FRAME) / TOKENS_PER_WORD)
    assert len({tuple(each[:shared]) for each in words}) == 1
    assert len({each[shared] for each in words}) > 6
    assert all(abs(tokens(body) - 120) <= FRAME + 1 for body in bodies)


def test_a_chat_gets_messages() -> None:
    (body,) = first(1, Work(), target=CHAT)
    assert [message["role"] for message in body["messages"]] == ["user"] and "prompt" not in body


def test_answers_of_full_length_are_asked_for_unless_told_not_to() -> None:
    assert first(1, Work())[0]["ignore_eos"] is True
    assert "ignore_eos" not in first(1, Work(ignore_eos=False))[0]


def test_a_file_is_asked_line_by_line_and_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "max_tokens": 7}\n\n{"prompt": [1, 2, 3]}\n')
    bodies = first(3, Work(output=Span(4, 9), prompts=path))
    assert [(body["prompt"], body["max_tokens"]) for body in bodies] == [("a b", 7), ([1, 2, 3], 9), ("a b", 7)]
    plain = tmp_path / "prompts.txt"
    plain.write_text("first\nsecond\n")
    assert [row["prompt"] for row in read_prompts(plain)] == ["first", "second"]


def test_a_conversation_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n')
    (body,) = first(1, Work(prompts=path), target=CHAT)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    with pytest.raises(TextError, match="--chat"):
        try:
            first(1, Work(prompts=path))
        except TextError as error:
            raise TextError(error.one_line()) from None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"{}\n",
        b"[1]\n",
        b"{bad\n",
        b'{"prompt": "a", "messages": []}\n',
        b'{"prompt": "a", "max_tokens": 0}\n',
        b'{"prompt": "a", "max_tokens": "x"}\n',
        b"\xff\xfe",
    ],
)
def test_a_file_that_holds_no_prompts(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(TextError) as caught:
        read_prompts(path)
    assert str(caught.value.where).startswith(str(path))


def test_token_ids_are_no_chat(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_text('{"prompt": [1, 2]}\n')
    with pytest.raises(TextError):
        first(1, Work(prompts=path), target=CHAT)
