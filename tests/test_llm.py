"""A model in this process: texts that the tokenizer agrees with, stop strings, many prompts and streams at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantlab
from quantlab import LLM, EngineOptions, Grammar, SamplingParams
from quantlab.errors import CheckpointError, GrammarError, UsageError

PROMPTS = ["It was a dark and", "Call me", "The", '"I am afraid," said the']
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def llm(books_5m: Path) -> LLM:
    return LLM(books_5m, EngineOptions(device="cpu", kv_memory=1 << 24))


def test_a_text_is_what_the_tokenizer_makes_of_its_tokens(llm: LLM) -> None:
    for prompt, found in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        assert found.prompt_ids == tuple(llm.tokenizer.encode(prompt, special_tokens=True))
        assert len(found.token_ids) == 24
        whole = llm.tokenizer.decode([*found.prompt_ids, *found.token_ids])
        assert whole.endswith(found.text)
        assert len(found.text) > 24
        assert (found.finish_reason, found.stop, found.error) == ("length", None, None)


def test_prompts_together_say_what_each_says_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, GREEDY)
    assert [found.text for found in together] == [llm.generate([prompt], GREEDY)[0].text for prompt in PROMPTS]


def test_token_ids_are_a_prompt_as_they_are(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0], special_tokens=True)
    assert llm.generate([ids], GREEDY)[0].text == llm.generate([PROMPTS[0]], GREEDY)[0].text


def test_a_stop_string_ends_the_text_before_it_and_frees_its_blocks(llm: LLM) -> None:
    free = llm.generate([PROMPTS[0]], GREEDY)[0].text
    stop = free[10:16]
    found = llm.generate([PROMPTS[0]], GREEDY, stop=[stop, "never said"])[0]
    assert found.text == free[: free.index(stop)]
    assert (found.finish_reason, found.stop) == ("stop", stop)
    assert llm.tokenizer.decode(list(found.token_ids)).startswith(found.text + stop[0])
    stats = llm._engine.stats()
    assert (stats.running, stats.blocks_free) == (0, stats.blocks_total)


def test_a_stop_token_is_told_but_not_written(llm: LLM) -> None:
    free = llm.generate([PROMPTS[1]], GREEDY)[0]
    token = free.token_ids[5]
    at = free.token_ids.index(token)
    found = llm.generate([PROMPTS[1]], SamplingParams(24, temperature=0, stop_token_ids=(token,)))[0]
    assert (found.finish_reason, found.stop) == ("stop", token)
    assert found.token_ids == free.token_ids[: at + 1]
    assert free.text.startswith(found.text)
    assert len(found.text) < len(free.text)


def test_settings_may_differ_from_prompt_to_prompt(llm: LLM) -> None:
    found = llm.generate(["The", "The"], [SamplingParams(3, temperature=0), SamplingParams(5, temperature=0)])
    assert [len(each.token_ids) for each in found] == [3, 5]
    assert found[1].text.startswith(found[0].text)


def test_a_seed_gives_the_same_text_whatever_else_is_written(llm: LLM) -> None:
    seeded = SamplingParams(16, seed=7)
    alone = llm.generate(["The"], seeded)[0].text
    others = [SamplingParams(16, temperature=1.5)] * 3
    assert llm.generate(["It", "The", "A", "B"], [others[0], seeded, *others[1:]])[1].text == alone


def test_log_probabilities_are_parallel_to_tokens(llm: LLM) -> None:
    found = llm.generate(["The old man"], SamplingParams(6, temperature=0, logprobs=2, prompt_logprobs=0))[0]
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    assert [each.top[0][0] for each in found.logprobs] == list(found.token_ids)
    assert all(each.rank == 1 and each.logprob <= 0 for each in found.logprobs)
    assert len(found.prompt_logprobs) == len(found.prompt_ids)
    assert found.prompt_logprobs[0] is None


def test_pieces_put_together_are_the_text(llm: LLM) -> None:
    pieces = list(llm.stream(PROMPTS, GREEDY))
    whole = llm.generate(PROMPTS, GREEDY)
    for index, found in enumerate(whole):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == found.text
        assert [piece.completion is not None for piece in mine] == [False] * (len(mine) - 1) + [True]
        assert len(mine) > 10


def test_two_streams_at_once_do_not_disturb_each_other(llm: LLM) -> None:
    expected = [found.text for found in llm.generate(PROMPTS[:2], GREEDY)]
    streams = [llm.stream([prompt], GREEDY) for prompt in PROMPTS[:2]]
    texts = ["", ""]
    for pair in zip(*streams, strict=False):
        texts = [text + piece.text for text, piece in zip(texts, pair, strict=True)]
    texts = [text + "".join(p.text for p in rest) for text, rest in zip(texts, streams, strict=True)]
    assert texts == expected


def test_a_stream_that_is_left_early_gives_up_its_request(llm: LLM) -> None:
    stream = llm.stream(PROMPTS, SamplingParams(500, temperature=0))
    next(stream)
    assert llm._engine.stats().running == len(PROMPTS)
    stream.close()
    assert llm._engine.stats().running == 0
    assert llm.generate(["The"], GREEDY)[0].finish_reason == "length"


def test_an_interrupt_in_the_middle_of_a_step_harms_neither_the_model_nor_another_stream(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [found.text for found in llm.generate(PROMPTS[:2], GREEDY)]
    other = llm.stream(PROMPTS[:1], GREEDY)
    text = "".join(next(other).text for _ in range(3))
    forward = llm._engine._runner.forward  # type: ignore[attr-defined]

    def interrupted(step: object) -> object:
        monkeypatch.undo()
        forward(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._engine._runner, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[1:2], GREEDY)
    assert text + "".join(piece.text for piece in other) == expected[0]
    assert llm.generate(PROMPTS[1:2], GREEDY)[0].text == expected[1]


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("The", GREEDY, "one text"),
        (["The", []], GREEDY, "no token"),
        (["The", [10**9]], GREEDY, "token ids"),
        (["The"], [GREEDY, GREEDY], "1 prompts, but 2"),
        (["The"], SamplingParams(temperature=-1), "temperature"),
        (["The", "word " * 3000], GREEDY, "the longest"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_begun(
    llm: LLM, prompts: list[str], params: SamplingParams, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        llm.generate(prompts, params)
    stats = llm._engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert llm.generate(["The"], GREEDY)[0].text


def test_an_empty_stop_string_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="a stop string is empty"):
        llm.generate(["The"], GREEDY, stop=[".", ""])


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_messages_become_a_prompt_by_the_folders_template(llm: LLM, books_5m: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(books_5m, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat = LLM(folder, EngineOptions(device="cpu", kv_memory=1 << 24))
    prompt = chat.chat_prompt([{"role": "user", "content": "Who is there?"}])
    assert prompt == tuple(llm.tokenizer.encode("user: Who is there?\nassistant:"))
    assert chat.generate([prompt], GREEDY)[0].text == llm.generate([prompt], GREEDY)[0].text
    with pytest.raises(CheckpointError, match="no chat template") as caught:
        llm.chat_prompt([{"role": "user", "content": "Who is there?"}])
    assert caught.value.fix == "a plain prompt, or a model that was made for chat"


SCHEMA = '{"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}'


def test_a_text_after_a_schema_is_json_that_fits_it(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    params = SamplingParams(64, temperature=0, grammar=Grammar("json_schema", SCHEMA))
    bound, free = llm.generate(["The old man", "The old man"], [params, GREEDY])
    assert bound.finish_reason == "stop"
    assert isinstance(json.loads(bound.text)["old"], bool)
    assert free.text == llm.generate(["The old man"], GREEDY)[0].text


def test_a_schema_that_is_none_is_refused_before_anything_is_begun(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(GrammarError):
        llm.generate(["a", "b"], [GREEDY, SamplingParams(grammar=Grammar("json_schema", '{"type": 3}'))])
    assert llm._engine.stats().running == llm._engine.stats().waiting == 0


def test_importing_quantlab_imports_nothing_heavy() -> None:
    code = "import sys, quantlab; quantlab.__version__; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="LMM"):
        quantlab.LMM  # noqa: B018
