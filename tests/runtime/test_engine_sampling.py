"""Every sampling setting through a whole engine on the shipped model, where nothing else may show in a text."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers

from quantlab.runtime.build import build_engine
from quantlab.runtime.engine import Engine
from quantlab.runtime.options import EngineOptions
from quantlab.runtime.request import Grammar, Request, SamplingParams, TokenEvent
from quantlab.text import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
# Sizes and seeds such that no draw lies at the border of two tokens, where rounding would decide.
SETTINGS = (
    SamplingParams(max_tokens=40, seed=1),
    SamplingParams(max_tokens=40, seed=2, top_p=0.9, temperature=0.8),
    SamplingParams(max_tokens=40, seed=3, top_k=20, repetition_penalty=1.3),
    SamplingParams(max_tokens=40, temperature=0.0, presence_penalty=0.7, frequency_penalty=0.3),
    SamplingParams(max_tokens=40, seed=4, min_p=0.1, logit_bias=((300, 2.0), (17, -5.0))),
    SamplingParams(max_tokens=40, seed=5, min_tokens=20, stop_token_ids=(265, 14)),
    SamplingParams(max_tokens=100, seed=6, grammar=JSON),
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
)


def engine_for(folder: Path, blocks: int, overlap: bool = False, tokens: int = 128) -> Engine:
    """An engine over `blocks` blocks of 16 tokens."""
    options = EngineOptions(device="cpu", dtype="float32", max_model_len=128, max_num_seqs=8, max_batch_tokens=tokens)
    engine = build_engine(folder, options_with(options, folder, blocks))
    engine._overlap = overlap
    return engine


def options_with(options: EngineOptions, folder: Path, blocks: int) -> EngineOptions:
    raw = json.loads((folder / "config.json").read_text())
    head = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    block = 2 * raw["num_hidden_layers"] * raw["num_key_value_heads"] * head * 4 * 16
    fields = {name: getattr(options, name) for name in EngineOptions.__dataclass_fields__}
    return EngineOptions(**{**fields, "kv_memory": block * blocks})


def run(engine: Engine, requests: list[Request]) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        engine._scheduler.check_integrity()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    assert events[-1].error is None
    return [token for event in events for token in event.token_ids]


def requests(prompts: list[tuple[int, ...]]) -> list[Request]:
    return [Request(str(i), prompts[i % len(prompts)], params) for i, params in enumerate(SETTINGS)]


@pytest.fixture(scope="module")
def prompts(books_tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    texts = ("It was", "The catalogue says that the second volume of the work, bound in red", "Once more", "No")
    return [tuple(books_tokenizer.encode(text)) for text in texts]


@pytest.fixture(scope="module")
def alone(books_5m: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    engine = engine_for(books_5m, 64)
    return [tokens(run(engine, [request])[request.request_id]) for request in requests(prompts)]


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
@pytest.mark.parametrize("blocks", [64, 12], ids=["room", "preemption"])
def test_texts_do_not_depend_on_company_preemption_or_overlap(
    books_5m: Path, prompts: list[tuple[int, ...]], alone: list[list[int]], blocks: int, overlap: bool
) -> None:
    engine = engine_for(books_5m, blocks, overlap, tokens=24)
    events = run(engine, requests(prompts))
    assert (engine.stats().preemptions > 0) == (blocks == 12)
    assert [tokens(events[str(i)]) for i in range(len(SETTINGS))] == alone


def test_settings_show_in_the_texts(alone: list[list[int]], books_tokenizer: Tokenizer) -> None:
    assert len({tuple(text) for text in alone}) == len(SETTINGS)
    assert len(alone[5]) > 20 and not {265, 14} & set(alone[5][:20])
    assert len(alone[7]) == 40
    assert alone[6][-1] == 2
    jsonschema.validate(json.loads(books_tokenizer.decode(alone[6][:-1])), SCHEMA)


@pytest.mark.parametrize(
    "settings",
    [{"min_tokens": 30}, {"ignore_eos": True}, {"stop_token_ids": (2,), "min_tokens": 9}],
    ids=["min_tokens", "ignore_eos", "stop_token"],
)
def test_the_end_of_a_grammar_is_the_end_of_the_text(
    books_5m: Path, books_tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    """Nothing may follow a whole JSON text, so neither a least length nor a wish to go on can ask for more."""
    seven = Grammar("json_schema", '{"const": 7}')
    params = SamplingParams(max_tokens=60, temperature=0.0, grammar=seven, **settings)
    events = run(engine_for(books_5m, 32), [Request("a", (1, 300, 17), params)])["a"]
    assert events[-1].finish_reason == "stop" and events[-1].stop_token == 2
    assert books_tokenizer.decode(tokens(events)[:-1]) == "7"


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(
    books_5m: Path, prompts: list[tuple[int, ...]], alone: list[list[int]]
) -> None:
    bad = SamplingParams(grammar=Grammar("json_schema", '{"type": "no such"}'))
    events = run(engine_for(books_5m, 64), [Request("bad", (1, 5), bad), *requests(prompts)])
    assert events["bad"][-1].finish_reason == "error" and "grammar" in (events["bad"][-1].error or "")
    assert tokens(events["0"]) == alone[0]


def test_log_probabilities_are_those_of_transformers(books_5m: Path, prompts: list[tuple[int, ...]]) -> None:
    """Of the prompt in pieces of 5 tokens, and of the text, sampled with settings that must not show in them."""
    params = SamplingParams(max_tokens=6, seed=9, temperature=0.5, top_k=3, logprobs=2, prompt_logprobs=2)
    prompt = prompts[1]
    (first, *rest) = run(engine_for(books_5m, 32, tokens=5), [Request("a", prompt, params)])["a"]
    text = [token for event in (first, *rest) for token in event.token_ids]
    model = transformers.AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        expected = model(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
    assert first.prompt_logprobs is not None and first.prompt_logprobs[0] is None
    said = [*first.prompt_logprobs[1:], *(value for event in (first, *rest) for value in event.logprobs or ())]
    assert len(said) == len(prompt) - 1 + len(text)
    for row, token, value in zip(expected, [*prompt[1:], *text], said, strict=False):
        assert value is not None
        assert value.logprob == pytest.approx(row[token].item(), abs=2e-4)
        assert value.rank == int((row > row[token]).sum()) + 1
        assert [token for token, _ in value.top] == row.topk(2).indices.tolist()
