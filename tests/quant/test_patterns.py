"""Module patterns: whole names, whole-match expressions, and none that could hang."""

import time

import pytest

from quantlab.errors import RecipeError
from quantlab.quant.patterns import compile_pattern, matching

NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_a_plain_entry_is_a_whole_name() -> None:
    assert matching("lm_head", NAMES, "ignore") == ["lm_head"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r"re:.*\.down_proj", 12),
        (r"re:model\.layers\.1\..*", 2),
        (r"re:model\.layers\.(0|1|11)\..*", 6),
        (r"re:model\.layers\.[0-3]\..*", 8),
        (r"re:model\.layers\.\d+\.self_attn\.[qkv]_proj", 12),
        (r"re:.*\.(?:q_proj|down_proj)", 24),
        (r"re:(lm_head|.*\.q_proj)", 13),
    ],
)
def test_an_expression_must_match_the_whole_name(pattern: str, count: int) -> None:
    assert len(matching(pattern, NAMES, "ignore")) == count


def test_a_part_of_a_name_matches_nothing() -> None:
    with pytest.raises(RecipeError, match="the whole name must match"):
        matching(r"re:down_proj", NAMES, "ignore")


def test_a_suffix_is_answered_with_the_expression_for_it() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 're:\.\*\\\.down_proj'"):
        matching("down_proj", NAMES, "ignore")


def test_a_typo_is_answered_with_the_nearest_module() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'model\.layers\.3\.mlp\.down_proj'"):
        matching("model.layers.3.mlp.down_porj", NAMES, "ignore")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("re:(a+)+$", "a group may not be repeated"),
        ("re:(a|a)*b", "a group may not be repeated"),
        ("re:(?:a){9}", "a group may not be repeated"),
        ("re:.*.*.*.*.*x", "more than 4 repeats"),
        ("re:" + "a?" * 30 + "a" * 30, "more than 4 repeats"),
        ("re:" + "(a|a)" * 30, "too many alternatives"),
        ("re:" + "|".join("a" * 70), "too many alternatives"),
        (r"re:(a)\1", "back-references"),
        ("re:(?=a)b", "only (?:...) is allowed"),
        ("re:(?P<x>a)", "only (?:...) is allowed"),
        ("re:(", "is not a regular expression"),
        ("re:[a", "is not a regular expression"),
        ("re:*", "is not a regular expression"),
    ],
)
def test_a_bad_or_dangerous_expression_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compile_pattern(pattern, "ignore")
    assert reason in caught.value.message


@pytest.mark.parametrize("text", [r"[^\]]+", r"[]x]*", r"a\)*", r"\(x\)+", r"[(]*[)]+"])
def test_brackets_and_escapes_are_not_taken_for_groups(text: str) -> None:
    assert compile_pattern(f"re:{text}", "ignore").pattern == text


@pytest.mark.parametrize("pattern", ["re:.*.*.*.*x", "re:(.*|a)(.*|b)(.*|c)(.*|d)x", "re:" + "(a|b|c|d)" * 4 + ".*.*x"])
def test_the_worst_that_is_allowed_is_quick(pattern: str) -> None:
    names = [f"model.layers.{i}.self_attn.some_long_projection_name" for i in range(560)]
    started = time.monotonic()
    with pytest.raises(RecipeError, match="matches no module"):
        matching(pattern, names, "ignore")
    assert time.monotonic() - started < 30.0
