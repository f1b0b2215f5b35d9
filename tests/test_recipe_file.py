"""Recipes as YAML: every complaint at its line and column, every built-in sound."""

import shutil
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantlab import recipe_file
from quantlab.errors import RecipeError, UsageError
from quantlab.recipe import ORDER, Gptq, Recipe
from quantlab.recipe_file import builtin, builtin_names, builtin_text, for_quality, load_recipe, parse_recipe, regroup

QUALITIES = ("fast", "balanced", "best")
RTN = "passes:\n  - pass: rtn\n"


def refused(text: str) -> RecipeError:
    """The error of a bad recipe."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert "\n" not in caught.value.one_line()
    return caught.value


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_recipe_is_sound_and_named_after_its_file(name: str) -> None:
    recipe = builtin(name)
    assert recipe.name == name
    assert recipe.description
    assert name.startswith(recipe.scheme)
    assert builtin_text(name).startswith("#")


def test_builtins_cover_every_scheme_and_quality() -> None:
    wanted = {f"{scheme}-{quality}" for scheme in ("w4a16", "w8a8", "w8a16") for quality in QUALITIES}
    wanted |= {"w4a16-rtn", "w4a16-gptq", "w4a16-awq", "w4a16-awq-gptq"}
    wanted |= {"w8a8-rtn", "w8a8-gptq", "w8a8-smoothquant", "w8a16-rtn"}
    assert set(builtin_names()) == wanted


def test_installed_package_finds_its_recipes_beside_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(recipe_file.builtin_folder(), tmp_path / "quantlab" / "_recipes")
    monkeypatch.setattr(recipe_file, "__file__", str(tmp_path / "quantlab" / "recipe_file.py"))
    assert recipe_file.builtin_folder() == tmp_path / "quantlab" / "_recipes"


def test_for_quality_changes_grouping_and_keeps_the_passes() -> None:
    plain = for_quality("w4a16", "balanced")
    changed = for_quality("w4a16", "balanced", "channel", False)
    assert (plain.group_size, plain.symmetric) == (128, True)
    assert (changed.group_size, changed.symmetric) == ("channel", False)
    assert changed.passes == plain.passes


def test_fast_and_balanced_use_no_gradients() -> None:
    for scheme in ("w4a16", "w8a8", "w8a16"):
        for quality in ("fast", "balanced"):
            kinds = {step.kind for step in for_quality(scheme, quality).passes}
            assert kinds.isdisjoint({"rounding", "distill"})


@pytest.mark.parametrize(
    ("scheme", "group_size", "symmetric", "option"),
    [("w8a8", 64, None, "--group-size"), ("w8a8", None, False, "--symmetric"), ("w8a16", None, False, "--symmetric")],
)
def test_impossible_schemes_are_refused(
    scheme: str, group_size: int | None, symmetric: bool | None, option: str
) -> None:
    with pytest.raises(UsageError) as caught:
        for_quality(scheme, "fast", group_size, symmetric)  # type: ignore[arg-type]
    assert caught.value.where == option


def test_regroup_without_changes_is_the_same_recipe() -> None:
    recipe = builtin("w4a16-best")
    assert regroup(recipe, None, None) == recipe


def test_unknown_builtin_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'w4a16-balanced'"):
        builtin("w4a16-balancd")


def test_values_reach_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "name: mine\nscheme: w4a16\ngroup_size: 32\nignore: [lm_head, 're:.*down_proj']\n"
        "overrides:\n  - match: model.layers.0.mlp.up_proj\n    scheme: skip\n"
        "passes:\n  - pass: gptq\n    damping: 0.05\n    descent_rounds: 2\n"
    )
    recipe = load_recipe(path)
    assert recipe.group_size == 32
    assert recipe.ignore == ("lm_head", "re:.*down_proj")
    assert recipe.overrides[0].scheme == "skip"
    assert recipe.passes == (Gptq.model_validate({"pass": "gptq", "damping": 0.05, "descent_rounds": 2}),)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("group_sise: 32\n" + RTN, "1:1", "unknown key 'group_sise', did you mean 'group_size'?"),
        ("passes:\n  - pass: gptq\n    dampin: 1\n", "3:5", "unknown key 'dampin', did you mean 'damping'?"),
        ("passes:\n  - pass: gtpq\n", "2:11", "unknown pass 'gtpq', did you mean 'gptq'?"),
        ("passes:\n  - grid: mse\n", "2:5", "each pass needs a 'pass:' key"),
        ("passes:\n  - kind: rtn\n", "2:5", "unknown key 'kind'"),
        ("scheme: w4a61\n" + RTN, "1:9", "did you mean 'w4a16'?"),
        ("group_size: 48\n" + RTN, "1:13", "should be 32, 64, 128 or 'channel', not 48"),
        ("passes:\n  - pass: gptq\n    damping: 7\n", "3:14", "should be less than or equal to 1, not 7"),
        ("passes:\n  - pass: gptq\n    damping: .nan\n", "3:14", "damping"),
        ("passes:\n  - pass: gptq\n    block_size: 1.5\n", "3:17", "block_size"),
        ("passes:\n  - rtn\n", "2:5", "must be a mapping of keys, not 'rtn'"),
        ("passes: rtn\n", "1:9", "must be a list, not 'rtn'"),
        ("passes: []\n", "1:9", "needs at least one entry"),
        ("scheme: w4a16\n", "1:1", "the key 'passes' is missing"),
        ("passes:\n  - pass: gptq\n  - pass: awq\n", "1:1", "passes must come in the order"),
        ("passes:\n  - pass: rtn\n  - pass: gptq\n", "1:1", "exactly one of rtn and gptq"),
        ("name: x\npasses:\n  - pass: awq\n  - pass: awq\n  - pass: rtn\n", "2:1", "a pass may appear once"),
        ("scheme: w4a16\nscheme: w8a8\n" + RTN, "2:1", "duplicate key 'scheme', first set on line 1"),
        ("a: &a [1]\nb: *a\n", "1:4", "anchors and aliases are not allowed"),
        ("when: !!python/object/apply:os.system ['true']\n", "1:7", "is not allowed"),
        ("name: !!python/name:os.system\n" + RTN, "1:7", "is not allowed"),
        ("name: 2020-01-01\n" + RTN, "1:7", "timestamp"),
        ("seed: " + "9" * 5000 + "\n", "1:7", "a value that cannot be read"),
        ("passes: " + "[" * 40 + "]" * 40, "1:24", "nested deeper than 16 levels"),
        ("passes: [\n", "2:1", "not YAML"),
        ("a: b: c\n", "1:5", "not YAML"),
        ("- rtn\n", "1:1", "a recipe is a mapping"),
        ("# nothing\n", "1:1", "the file is empty"),
        ("? [a]\n: 1\n", "1:3", "a key must be a plain word"),
        ("scheme: w8a8\ngroup_size: 64\n" + RTN, "2:13", "one scale per output channel"),
        ("scheme: w8a16\nsymmetric: false\n" + RTN, "2:12", "asymmetric codes exist for w4a16 only"),
        ("overrides:\n  - match: a\n    scheme: w8a8\n    group_size: 32\n" + RTN, "4:17", "one scale per output"),
        ("overrides:\n  - match: a\n    schem: skip\n" + RTN, "3:5", "did you mean 'scheme'?"),
        ("overrides:\n  - match: a\n" + RTN, "2:5", "the key 'scheme' is missing"),
        ("name: a b\n" + RTN, "1:7", "name"),
    ],
)
def test_mistake_is_told_at_its_line_and_column(text: str, place: str, message: str) -> None:
    error = refused(text)
    assert error.where == f"r.yaml:{place}"
    assert message in error.message


def test_two_documents_in_one_file_are_refused() -> None:
    assert "not YAML" in refused(RTN + "---\n" + RTN).message


def test_further_mistakes_are_counted() -> None:
    assert refused("scheme: x\ngroup_size: 1\n" + RTN).message.endswith("(and 1 more)")


def test_control_characters_do_not_reach_the_terminal() -> None:
    error = refused('"\\e[31mred": 1\n' + RTN)
    assert "\x1b" not in error.one_line()


def test_alias_bomb_costs_nothing() -> None:
    lines = ["a: &a [x]"] + [f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20)]
    started = time.monotonic()
    assert "anchors" in refused("\n".join(lines)).message
    assert time.monotonic() - started < 1.0


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.yaml"
    big.write_text("# " + "x" * 1_000_001)
    binary.write_bytes(b"name: \xff\xfe")
    for path, message in (
        (big, "larger than 1,000,000 bytes"),
        (binary, "not UTF-8 text (byte 6)"),
        (tmp_path, "a folder, not a recipe file"),
        (tmp_path / "w4a16-balancd.yaml", "no such recipe file; the built-in one is called 'w4a16-balanced'"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.where == str(path)
        assert message in caught.value.message


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        recipe = parse_recipe(text, "r.yaml")
    except RecipeError as error:
        assert error.one_line().isprintable()
    else:
        assert isinstance(recipe, Recipe)


KEYS = st.sampled_from(["name", "scheme", "group_size", "passes", "pass", "ignore", "overrides", "match", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*ORDER, "w4a16", "skip", "channel"])
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_tree_is_a_recipe_or_a_recipe_error(tree: dict[str, object]) -> None:
    text = yaml.safe_dump(tree)
    try:
        recipe = parse_recipe(text, "r.yaml")
    except RecipeError as error:
        assert error.where is not None and error.where.startswith("r.yaml")
    else:
        assert recipe.passes
