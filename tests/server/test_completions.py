"""/v1/completions over a scripted engine, which says the prompt again and again."""

from typing import Any

import pytest

from tests.server.serving import Server, events

PROMPT = "Once upon a time there was"


def choice(answer: Any) -> Any:
    (only,) = answer.json()["choices"]
    return only


def test_a_completion_has_its_text_its_end_and_its_counts(server: Server) -> None:
    answer = server.complete(PROMPT, max_tokens=8)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "books-5m"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Once upon a time there wasOnce upon",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 8,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_unless_asked_and_never_more_than_fit(server: Server) -> None:
    assert server.complete(PROMPT).json()["usage"]["completion_tokens"] == 16
    assert server.complete([5] * 250).json()["usage"]["completion_tokens"] == 6


def test_a_stream_gives_the_same_text_and_the_counts_last(server: Server) -> None:
    whole = choice(server.complete(PROMPT, max_tokens=8))
    stream = server.complete(PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, counts, done = events(stream)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert counts["choices"] == [] and counts["usage"]["completion_tokens"] == 8


def test_prompts_of_every_kind_are_answered_in_order(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    for prompt in ([PROMPT, "It was"], [ids, ids[2:4]]):
        answers = server.complete(prompt, n=2, max_tokens=2).json()["choices"]
        assert [answer["index"] for answer in answers] == [0, 1, 2, 3]
        assert [answer["text"] for answer in answers[:2]] == ["Once upon"] * 2
        assert answers[2]["text"] == answers[3]["text"] != "Once upon"


def test_prompts_count_once_however_many_answers_they_have(server: Server) -> None:
    usage = server.complete([PROMPT, PROMPT], n=3, max_tokens=2).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (12, 12)


def test_echo_gives_the_prompt_back_with_its_log_probabilities(server: Server) -> None:
    answer = choice(server.complete(PROMPT, echo=True, logprobs=2, max_tokens=3))
    assert answer["text"] == PROMPT + "Once upon a"
    logprobs = answer["logprobs"]
    assert "".join(logprobs["tokens"]) == answer["text"]
    assert logprobs["token_logprobs"] == [None] + [-1.0] * 5 + [-0.5] * 3
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][-1]) == 2
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert answer["text"][offset : offset + len(token)] == token


def test_echo_streams_what_it_gives_whole(server: Server) -> None:
    whole = choice(server.complete(PROMPT, echo=True, logprobs=0, max_tokens=3))
    *chunks, _ = events(server.complete(PROMPT, echo=True, logprobs=0, max_tokens=3, stream=True))
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [entry for piece in pieces for entry in piece["logprobs"][field]] == whole["logprobs"][field]


def test_no_token_is_asked_for_and_the_prompt_is_scored(server: Server) -> None:
    answer = server.complete(PROMPT, echo=True, logprobs=0, max_tokens=0).json()
    assert answer["choices"][0]["text"] == PROMPT
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 6
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "text"), [(" time", "Once upon a"), (["zzz", "pon a t"], "Once u")])
def test_a_stop_string_ends_the_text_before_it(server: Server, stop: Any, text: str, stream: bool) -> None:
    answer = server.complete(PROMPT, stop=stop, max_tokens=100, stream=stream)
    pieces = [event["choices"][0] for event in events(answer)[:-1]] if stream else [choice(answer)]
    assert "".join(piece["text"] for piece in pieces) == text
    assert pieces[-1]["finish_reason"] == "stop"
    assert pieces[-1]["stop_reason"] == (stop if isinstance(stop, str) else stop[1])


def test_a_stop_string_frees_what_the_request_held(server: Server) -> None:
    answer = server.complete(PROMPT, stop=" time", max_tokens=100)
    assert answer.json()["usage"]["completion_tokens"] == 4
    server.until(lambda: server.metric("num_requests_running") == 0)


def test_the_stop_string_may_be_kept(server: Server) -> None:
    answer = choice(server.complete(PROMPT, stop=" time", max_tokens=100, include_stop_str_in_output=True))
    assert answer["text"] == "Once upon a time"


def test_a_stop_token_ends_the_text_before_it(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    answer = choice(server.complete(PROMPT, stop_token_ids=[ids[3]], max_tokens=100))
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == ("Once upon a", "stop", ids[3])


def test_half_a_character_waits_for_the_other_half(server: Server) -> None:
    ids = server.post("/tokenize", {"prompt": "naïve 🙂"}).json()["tokens"]
    *chunks, _ = events(server.complete(ids, max_tokens=len(ids), stream=True))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "naïve 🙂"
    assert not any("\ufffd" in text for text in texts)
