"""Chat templates give what transformers' own environment gives; what they may not do, they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantlab import chat_template as module
from quantlab.chat_template import ChatTemplate, TemplateSource, template_of
from quantlab.errors import CheckpointError, UsageError
from quantlab.text import Tokenizer
from tests.tokenizers_at_hand import byte_level

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- set ns = namespace(system=none, turns=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = message['content'] | trim %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (ns.turns % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '[INST] ' if message['role'] == 'user' }}{% if ns.system and loop.last %}{{ ns.system + '\\n' }}{% endif %}
    {{- message['content'] | trim + (' [/INST]' if message['role'] == 'user' else eos_token) }}
{%- endfor %}
"""
MARKED = """{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}{% set shown = m.content %}{{ shown }}{{ eos_token }}{% endgeneration %}{% else %}
{{ {'role': m.role, 'text': m.content} | tojson }}{% endif %}
{% endfor %}{{ tools is none }} {{ enable_thinking | default('unset') }} {{ dict(a=1).a }}"""
TALK = [
    {"role": "system", "content": "Answer <b>briefly</b> & in 日本語."},
    {"role": "user", "content": " What is 2+2?\n"},
    {"role": "assistant", "content": "4 \U0001f600  "},
    {"role": "user", "content": "Why {{ bos_token }}?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made = byte_level(tmp_path_factory.mktemp("tokenizer"))
    made.backend.add_special_tokens(TOKENS)
    return made


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("source", [CHATML, LLAMA, MARKED], ids=["chatml", "llama", "marked"])
def test_a_prompt_is_the_one_of_transformers(source: str, generate: bool, count: int, tokenizer: Tokenizer) -> None:
    extra = {"enable_thinking": False} if generate else {}
    tokenizer.backend.chat_template = source
    expected = tokenizer.backend.apply_chat_template(
        TALK[:count], tokenize=False, add_generation_prompt=generate, **extra
    )
    template = template_of(tokenizer)
    assert template is not None
    assert ChatTemplate(template).render(TALK[:count], generate, extra=extra) == expected


@pytest.mark.parametrize("content", ["4 and", "4 and ", "  4 and\n", "Why {{ bos_token }}?"])
@pytest.mark.parametrize("source", [CHATML, LLAMA], ids=["chatml", "llama"])
def test_the_last_message_can_be_continued(source: str, content: str, tokenizer: Tokenizer) -> None:
    talk = [*TALK[:2], {"role": "assistant", "content": content}]
    tokenizer.backend.chat_template = source
    expected = tokenizer.backend.apply_chat_template(talk, tokenize=False, continue_final_message=True)
    template = ChatTemplate(TemplateSource(source, TOKENS))
    assert template.render(talk, add_generation_prompt=False, continue_final_message=True) == expected


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate(TemplateSource(LLAMA, TOKENS))
    with pytest.raises(UsageError, match="refuses these messages: Roles must alternate"):
        template.render([TALK[1], TALK[1]])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ messages | sum }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self._TemplateReference__context }}{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ((1 ~ 'c') | attr('__class__')).mro() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ undefined_thing.field }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_ours(source: str) -> None:
    with pytest.raises(UsageError) as refused:
        ChatTemplate(TemplateSource(source)).render(TALK)
    assert len(refused.value.one_line()) < 600


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'a", "{% unknown %}", "{{ x | no_such_filter }}", "(" * 3 + "{{ " + "(" * 5000]
)
def test_a_malformed_template_is_the_checkpoints_fault(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(TemplateSource(source))


def test_sizes_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = ChatTemplate(
        TemplateSource("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}")
    )
    monkeypatch.setattr(module, "MAX_RENDERED_CHARS", 10_000)
    with pytest.raises(UsageError, match="more than 10000 characters"):
        endless.render(TALK)
    monkeypatch.setattr(module, "MAX_TEMPLATE_CHARS", 100)
    with pytest.raises(CheckpointError, match="longer than 100"):
        ChatTemplate(TemplateSource("x" * 101))


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools"])
def test_extra_names_are_not_ours(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        ChatTemplate(TemplateSource(CHATML)).render(TALK, extra={name: 1})


def test_continuing_needs_a_message_that_is_shown() -> None:
    hidden = ChatTemplate(TemplateSource("{{ messages | length }}"))
    for talk in ([], [{"role": "user", "content": " "}], [{"role": "user"}], TALK):
        with pytest.raises(UsageError, match="cannot be continued"):
            hidden.render(talk, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(UsageError, match="exclude"):
        hidden.render(TALK, continue_final_message=True)


def test_one_render_leaves_nothing_for_the_next() -> None:
    template = ChatTemplate(TemplateSource("{{ seen | default('new') }}{% set seen = 'old' %}{{ dict(a=2).a }}"))
    assert [template.render(TALK) for _ in range(2)] == ["new2", "new2"]


def test_the_template_of_a_tokenizer(tokenizer: Tokenizer, books_tokenizer: Tokenizer) -> None:
    assert template_of(books_tokenizer) is None
    tokenizer.backend.chat_template = {"tool_use": "t", "default": "d"}
    found = template_of(tokenizer)
    assert found is not None and found.source == "d" and found.special_tokens["bos_token"] == "<s>"
    tokenizer.backend.chat_template = {"tool_use": "t"}
    assert template_of(tokenizer) is None


def test_values_that_json_knows_go_through(tmp_path: Path) -> None:
    shown: Any = {"a": [1, 2.5, None, True, "é<"]}
    text = ChatTemplate(TemplateSource("{{ given | tojson(indent=1) }}")).render([], extra={"given": shown})
    assert json.loads(text) == shown and "é<" in text
