"""Every documented feature, asked by the official openai client and held against transformers where it can be."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from quantlab.text import Tokenizer
from tests.e2e.conftest import TEMPLATE
from tests.e2e.served import Served

PROMPT = "The captain looked at the sea and said"
MESSAGES: list[Any] = [{"role": "system", "content": "A sea story."}, {"role": "user", "content": "Go on."}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    """The official client."""
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(served: Served) -> str:
    return served.model


class Oracle:
    """The same model in transformers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special_tokens=True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest continuation."""
        asked = torch.tensor([ids])
        made = self.model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=count)
        return list(made[0, len(ids) :].tolist())

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """ln p of what follows each position: [T, V]."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def oracle(books_5m: Path, books_tokenizer: Tokenizer) -> Oracle:
    return Oracle(books_5m, books_tokenizer)


def complete(client: OpenAI, model: str, prompt: Any = PROMPT, **fields: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0} | fields
    return client.completions.create(model=model, prompt=prompt, **fields)


def chat(client: OpenAI, model: str, **fields: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0, "messages": MESSAGES} | fields
    return client.chat.completions.create(model=model, **fields)


def test_models_are_listed(client: OpenAI, model: str) -> None:
    assert [each.id for each in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_transformers_own(client: OpenAI, model: str, oracle: Oracle) -> None:
    answer = complete(client, model, max_tokens=20)
    ids = oracle.ids(PROMPT)
    whole = oracle.tokenizer.decode(ids + oracle.greedy(ids, 20))
    assert whole.endswith(answer.choices[0].text) and len(answer.choices[0].text) > 20
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", model, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)
    assert answer.usage.total_tokens == len(ids) + 20


def test_token_ids_ask_the_same(client: OpenAI, model: str, oracle: Oracle) -> None:
    assert complete(client, model, oracle.ids(PROMPT)).choices[0].text == complete(client, model).choices[0].text


def test_a_stream_has_the_same_text(client: OpenAI, model: str) -> None:
    whole = complete(client, model)
    chunks = list(complete(client, model, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces if chunk.choices[0].finish_reason] == ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in pieces)
    assert len({chunk.id for chunk in chunks}) == 1 and len(pieces) > 6


def test_without_asking_a_stream_has_no_usage(client: OpenAI, model: str) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in complete(client, model, stream=True))


def test_several_prompts_and_several_choices(client: OpenAI, model: str) -> None:
    prompts = [PROMPT, "Once upon a time", "In the morning"]
    answer = complete(client, model, prompts, n=2, seed=5, temperature=1.0)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 72
    alone = [complete(client, model, prompt).choices[0].text for prompt in prompts]
    together = complete(client, model, prompts)
    assert [choice.text for choice in together.choices] == alone
    streamed: dict[int, str] = {}
    for chunk in complete(client, model, prompts, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[index] for index in range(3)] == alone


def test_echo_repeats_the_prompt(client: OpenAI, model: str) -> None:
    answer = complete(client, model, echo=True)
    assert answer.choices[0].text == PROMPT + complete(client, model).choices[0].text
    assert complete(client, model, echo=True, max_tokens=0).choices[0].text == PROMPT


def test_logprobs_are_transformers_own(client: OpenAI, model: str, oracle: Oracle) -> None:
    found = complete(client, model, logprobs=3, echo=True).choices[0].logprobs
    ids = oracle.ids(PROMPT)
    ids += oracle.greedy(ids, 12)
    exact = oracle.logprobs(ids)
    assert found.token_logprobs[0] is None and len(found.tokens) == len(ids)
    for position in range(1, len(ids)):
        row = exact[position - 1]
        assert math.isclose(found.token_logprobs[position], row[ids[position]].item(), abs_tol=2e-3)
        likeliest = sorted(found.top_logprobs[position].values(), reverse=True)[:3]
        assert torch.allclose(torch.tensor(likeliest), row.topk(3).values, atol=2e-3)
    assert found.text_offset[-1] < len(PROMPT) + 100 and found.text_offset == sorted(found.text_offset)


def test_a_chats_logprobs(client: OpenAI, model: str, oracle: Oracle) -> None:
    answer = chat(client, model, logprobs=True, top_logprobs=2, max_tokens=6)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6 and all(len(each.top_logprobs) == 2 for each in content)
    assert all(each.logprob == each.top_logprobs[0].logprob for each in content)  # greedy
    assert bytes(b for each in content for b in each.bytes).decode() == answer.choices[0].message.content
    streamed = chat(client, model, logprobs=True, top_logprobs=2, max_tokens=6, stream=True)
    pieces = [choice.logprobs.content for chunk in streamed for choice in chunk.choices if choice.logprobs]
    assert [each.token for piece in pieces for each in piece] == [each.token for each in content]


def test_a_chat_is_its_template(client: OpenAI, model: str) -> None:
    answer = chat(client, model)
    rendered = "".join(f"{m['role']}: {m['content']}\n" for m in MESSAGES) + "assistant:"
    assert "assistant:" in TEMPLATE
    same = complete(client, model, rendered)
    assert answer.choices[0].message.content == same.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens


def test_a_chat_streams_its_role_first_and_its_usage_last(client: OpenAI, model: str) -> None:
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == chat(client, model).choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_content_may_come_in_parts_and_the_limit_by_its_newer_name(client: OpenAI, model: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Go "}, {"type": "text", "text": "on."}]}]
    one = chat(client, model, messages=parts)
    assert one.choices[0].message.content == (
        chat(client, model, messages=[{"role": "user", "content": "Go on."}]).choices[0].message.content
    )
    newer = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=3)
    assert newer.usage.completion_tokens <= 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_itself(client: OpenAI, model: str, stream: bool) -> None:
    free = complete(client, model, max_tokens=30).choices[0].text
    stop = free[12:17]
    answer = complete(client, model, max_tokens=30, stop=[stop, "\x00never"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == free[: free.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_stop_token_ids_and_min_tokens(client: OpenAI, model: str, oracle: Oracle) -> None:
    ids = oracle.ids(PROMPT)
    greedy = oracle.greedy(ids, 12)
    stopped = complete(client, model, extra_body={"stop_token_ids": [greedy[4]]})
    assert stopped.usage.completion_tokens == greedy.index(greedy[4]) + 1
    assert stopped.choices[0].finish_reason == "stop"
    longer = complete(client, model, extra_body={"stop_token_ids": [greedy[4]], "min_tokens": 9})
    assert longer.usage.completion_tokens >= 9


def test_a_seed_gives_the_same_text_whatever_else_runs(client: OpenAI, model: str, served: Served) -> None:
    def draw(seed: int) -> str:
        return str(complete(client, model, max_tokens=24, temperature=1.0, seed=seed).choices[0].text)

    alone = draw(7)
    noise = [threading.Thread(target=complete, args=(client, model, f"{index} {PROMPT}")) for index in range(6)]
    for thread in noise:
        thread.start()
    crowded = draw(7)
    for thread in noise:
        thread.join()
    assert crowded == alone and len({draw(seed) for seed in range(4)}) == 4


def test_without_a_seed_texts_differ(client: OpenAI, model: str) -> None:
    answer = complete(client, model, n=4, temperature=1.0, max_tokens=16)
    assert len({choice.text for choice in answer.choices}) > 1


@pytest.mark.parametrize("fields", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}])
def test_the_narrowest_choice_is_greedy(client: OpenAI, model: str, fields: dict[str, Any]) -> None:
    assert complete(client, model, temperature=1.5, **fields).choices[0].text == complete(client, model).choices[0].text


def test_logit_bias_bans_and_forces(client: OpenAI, model: str, oracle: Oracle) -> None:
    first = oracle.greedy(oracle.ids(PROMPT), 1)[0]
    banned = complete(client, model, logit_bias={str(first): -100}, logprobs=0)
    assert banned.choices[0].text != complete(client, model).choices[0].text
    forced = complete(client, model, logit_bias={"321": 100}, max_tokens=5)
    assert forced.choices[0].text.strip() == (oracle.tokenizer.decode([321]) * 5).strip()


@pytest.mark.parametrize(
    "fields", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.8}}]
)
def test_penalties_bring_other_words(client: OpenAI, model: str, fields: dict[str, Any]) -> None:
    def repeated(answer: Any) -> float:
        tokens = answer.choices[0].logprobs.tokens
        return 1 - len(set(tokens)) / len(tokens)

    free = complete(client, model, "the the the the the", max_tokens=48, logprobs=0)
    held = complete(client, model, "the the the the the", max_tokens=48, logprobs=0, **fields)
    assert repeated(held) < repeated(free)


def test_json_after_a_schema(client: OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"ship": {"enum": ["sloop", "brig"]}, "afloat": {"type": "boolean"}},
        "required": ["ship", "afloat"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for temperature in (0, 1.5):
        answer = chat(client, model, response_format=wanted, max_tokens=120, temperature=temperature, seed=1)
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_any_json_object(client: OpenAI, model: str) -> None:
    wanted = {"type": "json_object"}
    answer = chat(client, model, response_format=wanted, max_tokens=300, temperature=0.7, seed=3)
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_cached_prompt_tokens_are_counted(client: OpenAI, model: str) -> None:
    prompt = "A long story about a lighthouse. " * 12
    before = complete(client, model, prompt).usage
    again = complete(client, model, prompt).usage
    assert again.prompt_tokens_details.cached_tokens >= again.prompt_tokens - 32
    other = complete(client, model, prompt, extra_body={"cache_salt": "mine alone"}).usage
    assert other.prompt_tokens_details.cached_tokens == 0
    assert before.prompt_tokens == again.prompt_tokens == other.prompt_tokens


def test_tokenize_and_back(served: Served, oracle: Oracle) -> None:
    told = served.http.post("/tokenize", json={"prompt": PROMPT}).json()
    assert told["tokens"] == oracle.ids(PROMPT) and told["count"] == len(told["tokens"])
    bare = served.http.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": bare}).json()["prompt"] == PROMPT
    assert served.http.post("/tokenize", json={"messages": MESSAGES}).json()["count"] > 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"logprobs": 100}, "logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"suffix": "and so it ended"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [8192]}, "prompt"),
        ({"prompt": "word " * 5000}, "prompt"),
        ({"extra_body": {"tempratur": 1}}, "tempratur"),
        ({"extra_body": {"response_format": {"type": "json_schema"}}}, "response_format"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    client: OpenAI, model: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, **fields)
    assert caught.value.param == param
    assert caught.value.body and complete(client, model, max_tokens=1).choices[0].finish_reason == "length"


def test_a_prompt_that_does_not_fit_is_told_both_lengths(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, model, [5] * 2000, max_tokens=1000)
    assert {"2000", "1000", "2048"} <= set(caught.value.message.replace(",", "").replace("'", " ").split())


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, "gpt-4")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("tool", [{"tools": [{"type": "function", "function": {"name": "f"}}]}, {"store": True}])
def test_what_is_not_carried_out_is_refused(client: OpenAI, model: str, tool: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, model, **tool)


def test_every_state_route_answers(served: Served) -> None:
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/ready").status_code == 200
    assert served.http.get("/version").json()["version"]
    assert served.http.get("/").headers["content-security-policy"]


def test_metrics_count_what_was_asked(served: Served, client: OpenAI, model: str) -> None:
    before = served.metrics()
    complete(client, model, max_tokens=9)
    list(complete(client, model, max_tokens=5, stream=True))
    after = served.metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["generation_tokens_total"] == 14
    assert grown["time_to_first_token_seconds_count"] == grown["e2e_request_latency_seconds_count"] == 2
    assert grown["inter_token_latency_seconds_count"] == 12
    assert after["num_requests_running"] == after["num_requests_waiting"] == 0
    assert grown["request_success_total"] == 2


async def _asynchronously(served: Served, model: str) -> list[str]:
    http = httpx.AsyncClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", http_client=http) as client:
        stream = await client.completions.create(model=model, prompt=PROMPT, max_tokens=5, temperature=0, stream=True)
        return [chunk.choices[0].text async for chunk in stream]


def test_the_asynchronous_client_too(served: Served, client: OpenAI, model: str) -> None:
    assert "".join(asyncio.run(_asynchronously(served, model))) == complete(client, model, max_tokens=5).choices[0].text
