"""/v1/chat/completions over a scripted engine, which says the prompt again and again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server, events

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if loud is defined %}LOUD{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chatting(books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a template."""
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    server = Server(books_5m, {"chat_template": str(file)})
    yield server
    server.stop()
    assert server.wait() is None


def say(server: Server, *turns: tuple[str, Any], **fields: Any) -> Any:
    messages = [{"role": role, "content": content} for role, content in turns]
    return server.post("/v1/chat/completions", {"messages": messages, **fields})


def prompt_of(server: Server, *turns: tuple[str, Any], **fields: Any) -> str:
    """The prompt, which the engine says first of all."""
    tokens = say(server, *turns, max_tokens=1, **fields).json()["usage"]["prompt_tokens"]
    text: str = say(server, *turns, max_tokens=tokens, **fields).json()["choices"][0]["message"]["content"]
    return text


def test_a_conversation_goes_through_the_template(chatting: Server) -> None:
    turns = (("developer", "Be brief."), ("user", [{"type": "text", "text": "It "}, {"type": "text", "text": "was"}]))
    assert prompt_of(chatting, *turns) == "[system] Be brief.\n[user] It was\n[assistant]"


def test_an_answer_has_openais_shape(chatting: Server) -> None:
    answer = say(chatting, ("user", "It was"), max_completion_tokens=3, n=2)
    body = answer.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 6


def test_without_a_limit_the_answer_fills_the_models_length(chatting: Server) -> None:
    usage = say(chatting, ("user", "It was")).json()["usage"]
    assert usage["total_tokens"] == 256


def test_a_stream_begins_with_the_role_and_ends_with_the_counts(chatting: Server) -> None:
    whole = say(chatting, ("user", "It was"), max_tokens=5).json()["choices"][0]
    options = {"include_usage": True}
    *chunks, counts, done = events(say(chatting, ("user", "It was"), max_tokens=5, stream=True, stream_options=options))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and all("role" not in delta for delta in deltas[1:])
    assert "".join(delta["content"] for delta in deltas) == whole["message"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert counts["usage"]["completion_tokens"] == 5 and done == "[DONE]"


def test_log_probabilities_name_tokens_and_their_bytes(chatting: Server) -> None:
    choice = say(chatting, ("user", "naïve"), max_tokens=12, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12 and all(len(token["top_logprobs"]) == 2 for token in content)
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == choice["message"]["content"]


def test_the_last_message_may_be_continued(chatting: Server) -> None:
    turns = (("user", "It was"), ("assistant", "a dark"))
    assert prompt_of(chatting, *turns, continue_final_message=True) == "[user] It was\n[assistant] a dark"
    both = say(chatting, *turns, continue_final_message=True, add_generation_prompt=True)
    assert both.status_code == 400


def test_a_template_has_settings_of_its_own(chatting: Server) -> None:
    assert "LOUD" in prompt_of(chatting, ("user", "It was"), chat_template_kwargs={"loud": True})
    refused = say(chatting, ("user", "It was"), chat_template_kwargs={"messages": []})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


def test_what_the_template_refuses_is_the_clients_fault(chatting: Server) -> None:
    error = say(chatting, ("tool", "4")).json()["error"]
    assert "no tools here" in error["message"] and error["type"] == "invalid_request_error"


def test_tokenize_shows_what_a_conversation_becomes(chatting: Server) -> None:
    body = {"messages": [{"role": "user", "content": "It was"}]}
    ids = chatting.post("/tokenize", body).json()["tokens"]
    assert chatting.post("/detokenize", {"tokens": ids}).json()["prompt"] == "[user] It was\n[assistant]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"top_logprobs": 2}, None),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(chatting: Server, fields: Any, param: str | None) -> None:
    answer = chatting.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize("fields", [{"tools": [{"type": "function"}]}, {"functions": [{}]}, {"metadata": {"a": "b"}}])
def test_what_is_not_carried_out_is_said_so(chatting: Server, fields: Any) -> None:
    answer = chatting.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **fields})
    error = answer.json()["error"]
    (name,) = fields
    assert (error["message"], error["code"]) == (
        f"{name} is not supported by this server: leave it out", "unsupported_parameter",
    )  # fmt: skip


def test_defaults_that_are_spelled_out_are_served(chatting: Server) -> None:
    neutral = {"tools": None, "store": False, "tool_choice": "none", "modalities": ["text"], "service_tier": "auto"}
    neutral |= {
        "temperature": None,
        "stop": None,
        "logit_bias": None,
        "response_format": {"type": "text"},
        "user": "me",
    }
    assert say(chatting, ("user", "It was"), max_tokens=2, **neutral).status_code == 200


def test_a_schema_that_cannot_be_followed_is_refused_before_the_engine(chatting: Server) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sausage"}}}
    error = say(chatting, ("user", "It was"), response_format=wanted).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_schema")


def test_a_model_without_a_template_says_so(server: Server) -> None:
    error = say(server, ("user", "It was")).json()["error"]
    assert error["code"] == "no_chat_template" and "--chat-template" in error["message"]
    assert server.http.get("/v1/models").json()["data"][0]["chat_template"] is False
