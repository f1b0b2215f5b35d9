"""What cannot be meant is refused with the right status and the field's name, and the next request is answered."""

from typing import Any

import pytest

from tests.server.serving import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no prompt": ({}, "prompt", "missing_required_parameter"),
    "an unknown field": ({"prompt": "a", "max_tokns": 4}, "max_tokns", "unsupported_parameter"),
    "text for a number": ({"prompt": "a", "temperature": "1"}, "temperature", "invalid_value"),
    "a number for a text": ({"prompt": 5}, "prompt", "invalid_value"),
    "a mixed prompt": ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    "an empty prompt": ({"prompt": ""}, "prompt", "invalid_value"),
    "no prompts": ({"prompt": []}, "prompt", "invalid_value"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt", "invalid_value"),
    "too many prompts": ({"prompt": ["a"] * 257}, "prompt", "invalid_value"),
    "too many answers": ({"prompt": ["a"] * 200, "n": 2}, "n", "invalid_value"),
    "a negative id": ({"prompt": [-1]}, "prompt", "invalid_value"),
    "an id beyond the vocabulary": ({"prompt": [8192]}, "prompt", "invalid_value"),
    "too hot": ({"prompt": "a", "temperature": 2.5}, "temperature", "invalid_value"),
    "no probability": ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
    "n of nothing": ({"prompt": "a", "n": 0}, "n", "invalid_value"),
    "a penalty beyond": ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "invalid_value"),
    "negative length": ({"prompt": "a", "max_tokens": -1}, "max_tokens", "invalid_value"),
    "too long": ({"prompt": "a", "max_tokens": 10_000}, "max_tokens", "context_length_exceeded"),
    "a prompt too long": ({"prompt": [5] * 300}, "prompt", "context_length_exceeded"),
    "a text far too long": ({"prompt": "word " * 500_000}, "prompt", "context_length_exceeded"),
    "more tokens than there may be": ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
    "too many log probabilities": ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
    "a bias of no token": ({"prompt": "a", "logit_bias": {"9000": 1}}, "logit_bias", "invalid_value"),
    "a bias of a word": ({"prompt": "a", "logit_bias": {"word": 1}}, "logit_bias", "invalid_value"),
    "a bias too strong": ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    "a stop token of none": ({"prompt": "a", "stop_token_ids": [8192]}, "stop_token_ids", "invalid_value"),
    "too many stops": ({"prompt": "a", "stop": ["b"] * 17}, "stop", "invalid_value"),
    "an empty stop": ({"prompt": "a", "stop": [""]}, "stop", "invalid_value"),
    "a number to stop at": ({"prompt": "a", "stop": 5}, "stop", "invalid_value"),
    "a suffix": ({"prompt": "a", "suffix": "b"}, "suffix", "invalid_value"),
    "the best of some": ({"prompt": "a", "best_of": 3}, None, "invalid_value"),
    "stream options without a stream": ({"prompt": "a", "stream_options": {}}, None, "invalid_value"),
    "an unknown stream option": (
        {"prompt": "a", "stream": True, "stream_options": {"chunks": 1}},
        "stream_options",
        "unsupported_parameter",
    ),
    "priority without the policy": ({"prompt": "a", "priority": 1}, "priority", "unsupported_parameter"),
    "a format of no kind": ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    "a seed too large": ({"prompt": "a", "seed": 1 << 64}, "seed", "invalid_value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_completion_is_refused_by_the_name_of_its_field(server: Server, name: str) -> None:
    body, param, code = BAD[name]
    answer = server.post(COMPLETIONS, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
    assert error["message"].isprintable()


def test_the_length_error_says_both_lengths(server: Server) -> None:
    message = server.complete([5] * 250, max_tokens=20).json()["error"]["message"]
    assert "256" in message and "250" in message and "20" in message


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "missing_required_parameter"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b'"text"', 400, "invalid_value"),
        (b"null", 400, "invalid_value"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_value"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 100_000, 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_value"),
        (b"\xff\xfe", 400, "invalid_json"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Server, content: bytes, status: int, code: str) -> None:
    answer = server.http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


def test_half_a_character_in_a_message_is_no_text(server: Server) -> None:
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    answer = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_a_body_of_another_type_or_too_large_is_refused(server: Server) -> None:
    other = server.http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert (other.status_code, other.json()["error"]["code"]) == (415, "unsupported_media_type")
    large = server.http.post(COMPLETIONS, content=b" " * (9 << 20), headers={"content-type": "application/json"})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_does_not_say_its_size_is_bounded_too(server: Server) -> None:
    parts = (b" " * (1 << 20) for _ in range(9))
    answer = server.http.post(COMPLETIONS, content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_paths_methods_and_models_that_are_not_there(server: Server) -> None:
    assert server.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    for refused in (server.http.get(COMPLETIONS), server.http.put("/health", content=b"x")):
        assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
        assert refused.headers["allow"]
    assert server.http.get("/v1/models/gpt-5").status_code == 404
    refused = server.complete("a", model="gpt-5")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_one_sequence_that_fails_fails_alone(server: Server) -> None:
    failed = server.complete("It was", cache_salt="fail")
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "no luck")
    assert server.complete("It was", max_tokens=2).status_code == 200


def test_an_answer_bears_the_clients_id_or_a_new_one(server: Server) -> None:
    assert server.http.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    other = server.http.get("/version", headers={"x-request-id": "x" * 200}).headers["x-request-id"]
    assert len(other) == 32
