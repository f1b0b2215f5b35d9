"""Grammars: whatever is sampled under a schema parses and validates; schemas that cannot be followed are refused."""

import json
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.errors import GrammarError, UnsupportedModel
from quantlab.runtime import grammar as module
from quantlab.runtime.grammar import MAX_SCHEMA_BYTES, TokenGrammars
from quantlab.runtime.request import Grammar, SamplingParams, Sequence
from quantlab.runtime.sampler import NOTHING_LEFT, Sampler
from quantlab.text import Tokenizer
from tests.runtime.sampling import CPU, next_slice, sequence, step
from tests.tokenizers_at_hand import byte_level, sentence_piece_like, word_piece

EOS = 2
V = 8192
WORD = {"type": "string", "maxLength": 8}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "title": WORD,
            "kind": {"enum": ["novel", "poem", 7, None]},
            "year": {"type": "integer", "minimum": -20, "maximum": 2026},
        },
        "required": ["title", "kind", "year"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{2,9} [0-9]{4}$"},
    "either": {"anyOf": [{"const": {"a": [1, "é\n"]}}, {"type": "integer", "multipleOf": 7, "maximum": 99}]},
    "reference": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"type": "null"}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
    "date": {"type": "object", "properties": {"on": {"type": "string", "format": "date"}}, "required": ["on"],
             "additionalProperties": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars(books_5m: Path) -> TokenGrammars:
    return TokenGrammars(books_5m, V, [EOS])


def asked(slot: int, schema: dict[str, Any] | None, prompt: list[int], **settings: Any) -> Sequence:
    wanted = Grammar("json_object") if schema is None else Grammar("json_schema", json.dumps(schema))
    return sequence(SamplingParams(grammar=wanted, **settings), slot, tuple(prompt))


def sampler_for(rows: list[Sequence], grammars: TokenGrammars, vocab: int = V, eos: int = EOS) -> Sampler:
    sampler = Sampler(vocab, len(rows), CPU, [eos], grammars)
    for row in rows:
        sampler.admit(row)
    return sampler


def go_on(sampler: Sampler, rows: list[Sequence], logits: torch.Tensor) -> bool:
    """A step for the rows that have not ended; whether there are any."""
    eos = sampler.eos_token_ids[0]
    left = [i for i, row in enumerate(rows) if eos not in row.output_ids]
    if left:
        assert not step(sampler, [rows[i] for i in left], logits[left]).failed
    return bool(left)


def run(rows: list[Sequence], grammars: TokenGrammars, logits: torch.Tensor, steps: int = 300) -> None:
    sampler = sampler_for(rows, grammars, logits.shape[1])
    assert not all(go_on(sampler, rows, logits) for _ in range(steps)), "every text ends"


def text_of(tokenizer: Tokenizer, row: Sequence) -> str:
    assert row.output_ids[-1] == EOS
    return tokenizer.decode(row.output_ids[:-1])


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"seed": 1}, {"top_p": 0.9, "temperature": 1.5, "seed": 5}], ids=str
)
def test_every_text_of_a_model_validates(
    settings: dict[str, Any], books_5m: Path, books_tokenizer: Tokenizer, grammars: TokenGrammars
) -> None:
    prompt = books_tokenizer.encode("The catalogue's entry: ")
    rows = [asked(slot, schema, prompt, **settings) for slot, schema in enumerate(SCHEMAS.values())]
    sampler = sampler_for(rows, grammars)
    model = AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32, local_files_only=True)
    ids, cache = torch.tensor([prompt] * len(rows)), None
    for _ in range(120):
        with torch.inference_mode():
            out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if not go_on(sampler, rows, out.logits[:, -1]):
            break
        ids = torch.tensor([row.output_ids[-1:] for row in rows])
    for row, schema in zip(rows, SCHEMAS.values(), strict=True):
        jsonschema.validate(json.loads(text_of(books_tokenizer, row)), schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_tokens_chosen_at_random_validate(name: str, books_tokenizer: Tokenizer, grammars: TokenGrammars) -> None:
    """No model at all: every token that the mask allows is as likely as any other."""
    rows = [asked(slot, SCHEMAS[name], [1], seed=slot) for slot in range(16)]
    run(rows, grammars, torch.zeros(len(rows), V))
    texts = [text_of(books_tokenizer, row) for row in rows]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert len(set(texts)) > 4


def test_any_object_is_an_object(books_tokenizer: Tokenizer, grammars: TokenGrammars) -> None:
    """Objects may go on for ever, so an end is made likely wherever there may be one."""
    rows = [asked(slot, None, [1], seed=slot) for slot in range(12)]
    logits = torch.zeros(len(rows), V)
    for sign in '"}]:,':
        logits[:, books_tokenizer.encode(sign)[0]] = 8.0
    run(rows, grammars, logits)
    objects = [json.loads(text_of(books_tokenizer, row)) for row in rows]
    assert all(isinstance(value, dict) for value in objects) and any(objects)


def test_a_row_without_a_grammar_is_free(grammars: TokenGrammars) -> None:
    rows = [asked(0, {"const": 7}, [1], temperature=0.0), sequence(SamplingParams(temperature=0.0), 1)]
    logits = torch.zeros(2, V)
    logits[:, 5000] = 1.0
    assert step(sampler_for(rows, grammars), rows, logits).token_ids[1] == 5000
    assert rows[0].output_ids != [5000]


def test_a_grammar_goes_on_after_a_preemption(books_tokenizer: Tokenizer, grammars: TokenGrammars) -> None:
    row = asked(0, SCHEMAS["object"], [1], seed=3)
    sampler = Sampler(V, 2, CPU, [EOS], grammars)
    sampler.admit(row)
    for turn in range(120):
        step(sampler, [row], torch.zeros(1, V))
        if EOS in row.output_ids:
            break
        if turn % 5 == 4:
            assert row.slot is not None
            sampler.release(row.slot)
            row.slot = 1 - row.slot
            sampler.admit(row)
    jsonschema.validate(json.loads(text_of(books_tokenizer, row)), SCHEMAS["object"])


def test_a_whole_text_ends_even_before_its_least_length(books_tokenizer: Tokenizer, grammars: TokenGrammars) -> None:
    row = asked(0, {"const": 7}, [1], temperature=0.0, min_tokens=50)
    run([row], grammars, torch.zeros(1, V))
    assert text_of(books_tokenizer, row) == "7"


def test_a_text_that_the_grammar_does_not_allow_fails_its_row(grammars: TokenGrammars) -> None:
    row = asked(0, {"const": 7}, [1])
    row.output_ids.append(5000)
    assert sampler_for([row], grammars).launch(torch.zeros(1, V), [next_slice(row)]).result().failed == (
        (0, NOTHING_LEFT),
    )


def test_a_grammar_that_cannot_be_compiled_fails_its_row_and_not_the_engine(grammars: TokenGrammars) -> None:
    row = asked(0, {"type": "unheard of"}, [1])
    assert sampler_for([row], grammars).launch(torch.zeros(1, V), [next_slice(row)]).result().failed == (
        (0, NOTHING_LEFT),
    )


def test_without_grammars_a_row_that_asks_for_one_fails() -> None:
    row = asked(0, {"const": 7}, [1])
    sampler = Sampler(V, 1, CPU, [EOS])
    sampler.admit(row)
    assert sampler.launch(torch.zeros(1, V), [next_slice(row)]).result().failed == ((0, NOTHING_LEFT),)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"type": "wat"}', "wat"),
        ('{"not": {}}', "not"),
        ('{"contains": {}}', "contains"),
        ('{"type": "string", "format": "weird"}', "weird"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "greater than"),
        ('{"enum": []}', "nsatisfiable"),
        ('{"$ref": "#"}', "cannot be followed"),
        ('{"$ref": "http://example.com/schema"}', "registry"),
        ('{"$ref": "file:///etc/passwd"}', "registry"),
        ("[]", "no JSON object"),
        ("true", "no JSON object"),
        ("", "no JSON object"),
        ("{", "no JSON object"),
        ("[" * 20_000, "recursion"),
        (json.dumps({"enum": ["x" * MAX_SCHEMA_BYTES]}), "larger than"),
        (json.dumps({"allOf": [{"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {}}} for j in range(3)]}
                               for i in range(8)]}), "too large"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_in_a_sentence(
    schema: str, said: str, grammars: TokenGrammars
) -> None:
    with pytest.raises(GrammarError) as refused:
        grammars.check(Grammar("json_schema", schema))
    assert said in refused.value.message
    assert len(refused.value.one_line()) < 400 and "<state>" not in refused.value.message


def test_a_schema_that_takes_long_to_compile_is_refused(
    grammars: TokenGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 9973}))
    monkeypatch.setattr(module, "COMPILE_SECONDS", 1e-4)
    with pytest.raises(GrammarError, match="too complex"):
        grammars.check(slow)
    monkeypatch.undo()
    grammars.check(slow)


def test_a_schema_that_was_checked_elsewhere_is_followed_however_long_it_takes(
    grammars: TokenGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPILE_SECONDS", -1.0)
    mask = torch.zeros(V // 32, dtype=torch.int32)
    grammars.start(Grammar("json_schema", '{"const": "a little slower here"}')).fill(mask)
    assert bool(mask.any())


def test_a_schema_cannot_switch_the_guarantees_off(books_tokenizer: Tokenizer, grammars: TokenGrammars) -> None:
    loose = {"whitespace_pattern": "[x]*", "lenient": True, "item_separator": ";"}
    with pytest.raises(GrammarError, match="not"):
        grammars.check(Grammar("json_schema", json.dumps({"not": {}, "x-guidance": loose})))
    row = asked(
        0, {"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3, "x-guidance": loose}, [1], seed=5
    )
    run([row], grammars, torch.zeros(1, V))
    assert json.loads(text_of(books_tokenizer, row)) == [1, 1, 1]


@pytest.mark.parametrize("make", [byte_level, sentence_piece_like])
def test_grammars_work_with_tokenizers_of_every_common_kind(make: Any, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    vocab, eos = len(tokenizer.backend) + 30, tokenizer.eos_id
    grammars = TokenGrammars(tmp_path, vocab, [eos])
    rows = [asked(slot, {"enum": ["日本é😀 a", "hab\n", True]}, [5], seed=slot) for slot in range(32)]
    sampler = sampler_for(rows, grammars, vocab, eos)
    while go_on(sampler, rows, torch.zeros(len(rows), vocab)):
        pass
    texts = [tokenizer.decode([5, *row.output_ids[:-1]]) for row in rows]
    found = [json.loads(text[len(tokenizer.decode([5])) :]) for text in texts]
    assert {str(value) for value in found} == {"日本é😀 a", "hab\n", "True"}


def test_a_tokenizer_that_grammars_cannot_use_is_refused(tmp_path: Path, books_5m: Path) -> None:
    word_piece(tmp_path / "words")
    with pytest.raises(UnsupportedModel, match="cannot be used with this tokenizer"):
        TokenGrammars(tmp_path / "words", 20, [EOS]).prepare()
    (tmp_path / "none").mkdir()
    with pytest.raises(UnsupportedModel, match=r"need a tokenizer\.json"):
        TokenGrammars(tmp_path / "none", 20, [EOS]).check(Grammar("json_object"))
    (tmp_path / "spoilt").mkdir()
    shutil.copy(books_5m / "config.json", tmp_path / "spoilt" / "tokenizer.json")
    with pytest.raises(UnsupportedModel, match="cannot be used"):
        TokenGrammars(tmp_path / "spoilt", 20, [EOS]).prepare()


def test_a_grammar_that_one_thread_compiled_serves_another(
    grammars: TokenGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Grammar("json_schema", '{"type": "object", "properties": {"only": {"const": "here"}}}')
    with ThreadPoolExecutor(1) as other:
        other.submit(grammars.start, asked).result()
    monkeypatch.setattr(module, "_compile", None)
    matcher = grammars.start(asked)
    mask = torch.zeros(V // 32, dtype=torch.int32)
    matcher.fill(mask)
    assert bool(mask.any())


def test_the_same_grammar_is_compiled_once(grammars: TokenGrammars, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Grammar("json_schema", '{"const": "compiled once"}')
    grammars.check(wanted)
    monkeypatch.setattr(module, "COMPILE_SECONDS", -1.0)
    grammars.check(wanted)
    with pytest.raises(GrammarError):
        grammars.check(Grammar("json_schema", '{"const": "another"}'))


def test_without_the_extra_the_fix_is_named_and_nothing_heavy_is_imported(books_5m: Path) -> None:
    code = f"""
        import sys
        import importlib.util as util
        found = util.find_spec
        util.find_spec = lambda name, *rest: None if name == "llguidance" else found(name, *rest)
        from pathlib import Path
        from quantlab.errors import MissingExtra
        from quantlab.runtime.grammar import TokenGrammars
        from quantlab.runtime.request import Grammar
        try:
            TokenGrammars(Path({str(books_5m)!r}), 8192, [2]).check(Grammar("json_object"))
        except MissingExtra as error:
            print(error.one_line())
        print(sorted({{"torch", "transformers", "llguidance", "numpy"}} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "pip install 'quantlab[serve]'" in done.stdout and done.stdout.endswith("[]\n")
