"""Gates as YAML: what is shipped, and every mistake at its line and column."""

import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import GateError
from quantlab.eval import gate_file
from quantlab.eval.gate_file import Gate, builtin_names, default_gate, find_gate, load_gate, parse_gate
from quantlab.eval.metrics import TEXT_FIELDS, is_accuracy

RULE = "require:\n  - metric: kl.mean\n    max: 0.1\n"


def refused(text: str) -> GateError:
    """The error of a bad gate."""
    with pytest.raises(GateError) as caught:
        parse_gate(text, "g.yaml", "g.yaml")
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.one_line()
    return caught.value


def test_the_shipped_gates_are_sound() -> None:
    assert builtin_names() == ("default", "strict")
    for name in builtin_names():
        gate = find_gate(name)
        assert (gate.source, gate.alpha) == (name, 0.05)
        assert gate.description
        # Text is always measured, tasks only when asked for.
        assert all(rule.optional == is_accuracy(rule.metric) for rule in gate.rules)
    assert default_gate() == find_gate("default")


def test_the_strict_gate_allows_less_of_everything() -> None:
    for lax, strict in zip(default_gate().rules, find_gate("strict").rules, strict=True):
        assert (lax.metric, lax.test) == (strict.metric, strict.test)
        assert strict.margin < lax.margin if lax.test else strict.max < lax.max  # type: ignore[operator]


def test_an_installed_package_finds_its_gates_beside_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gate_file.builtin_folder(), tmp_path / "quantlab" / "_gates")
    monkeypatch.setattr(gate_file, "__file__", str(tmp_path / "quantlab" / "eval" / "gate_file.py"))
    assert gate_file.builtin_folder() == tmp_path / "quantlab" / "_gates"
    assert default_gate().source == "default"


def test_a_file_becomes_rules_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(
        "version: 1\ndescription: ours\nalpha: 0.01\nrequire:\n"
        "  - {metric: text.wiki.v2.kl.p99, max: 0.5}\n"
        "  - {metric: agreement, min: 0.95}\n"
        "  - {metric: tasks.accuracy, test: noninferiority, margin_points: 0.5}\n"
        "  - {metric: task.piqa.acc_norm, test: mcnemar, optional: true}\n"
        "  - {metric: tasks.flips, max: 0.06}\n"
    )
    gate = load_gate(path)
    assert gate == find_gate(str(path))
    assert (gate.source, gate.alpha, gate.description) == (str(path), 0.01, "ours")
    assert [rule.margin for rule in gate.rules] == [0.0, 0.0, 0.005, 0.0, 0.0]
    assert [rule.optional for rule in gate.rules] == [False, False, False, True, False]
    assert gate.places == tuple(f"{path}:{line}:5" for line in range(5, 10))


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("alpa: 0.1\n" + RULE, "1:1", "unknown key 'alpa', did you mean 'alpha'?"),
        ("require:\n  - metric: kl.mean\n    maximum: 1\n", "3:5", "unknown key 'maximum', did you mean 'max'?"),
        ("require:\n  - metric: kl.maen\n    max: 1\n", "2:13", "unknown metric 'kl.maen', did you mean 'kl.mean'?"),
        ("require:\n  - metric: text.a.kl\n    max: 1\n", "2:13", "unknown metric 'text.a.kl', did you mean 'text."),
        ("require:\n  - metric: task.\n    test: mcnemar\n", "2:13", "unknown metric 'task.'"),
        ("require:\n  - metric: kl.mean\n", "2:5", "exactly one of max, min and test, not none"),
        ("require:\n  - metric: kl.mean\n    max: 1\n    min: 0\n", "2:5", "not max and min"),
        ("require:\n  - metric: kl.mean\n    test: mcnemar\n", "2:5", "mcnemar compares accuracies; kl.mean takes"),
        ("require:\n  - metric: task.a.flips\n    test: mcnemar\n", "2:5", "mcnemar compares accuracies"),
        ("require:\n  - metric: task.*\n    test: mcnemarr\n", "3:11", "did you mean 'mcnemar'?"),
        ("require:\n  - metric: task.*\n    test: noninferiority\n", "2:5", "needs a margin_points above 0"),
        ("require:\n  - {metric: task.*, test: noninferiority, margin_points: 0}\n", "2:5", "margin_points above 0"),
        ("require:\n  - {metric: task.*, test: mcnemar, margin_points: -1}\n", "2:52", "greater than or equal to 0"),
        ("require:\n  - {metric: kl.mean, max: 1, margin_points: 1}\n", "2:5", "margin_points belongs to a test"),
        ("require:\n  - {metric: tasks.flips, max: 6}\n", "2:5", "a share between 0 and 1: 6 % is 0.06"),
        ("require:\n  - {metric: agreement, min: 95}\n", "2:5", "a share between 0 and 1: 95 % is 0.95"),
        ("require:\n  - {metric: ppl_ratio, max: 0}\n", "2:5", "above 0"),
        ("require:\n  - {metric: kl.mean, max: yes}\n", "2:28", "valid number, not True"),
        ("require:\n  - {metric: kl.mean, max: '0.1'}\n", "2:28", "valid number, not '0.1'"),
        ("require:\n  - {metric: kl.mean, max: .nan}\n", "2:28", "finite number"),
        ("require:\n  - {metric: kl.mean, max: .inf}\n", "2:28", "finite number"),
        ("require:\n  - {metric: kl.mean, max: 1.0e+305}\n", "2:28", "less than or equal to"),
        (
            "require:\n  - {metric: task.*, test: noninferiority, margin_points: 1.0e-300}\n",
            "2:5",
            "one item in a mill",
        ),
        ("require:\n  - {metric: kl.mean, max: 1, optional: 1}\n", "2:41", "valid boolean"),
        ("require:\n  - {metric: '', max: 1}\n", "2:14", "at least 1 character"),
        ("alpha: 0\n" + RULE, "1:8", "greater than or equal to 0.001"),
        ("alpha: 0.5\n" + RULE, "1:8", "less than or equal to 0.25"),
        ("version: 2\n" + RULE, "1:10", "version: should be 1"),
        ("require: []\n", "1:10", "needs at least one entry"),
        ("require: kl.mean\n", "1:10", "must be a list"),
        ("require:\n  - kl.mean\n", "2:5", "must be a mapping of keys, not 'kl.mean'"),
        ("alpha: 0.05\n", "1:1", "the key 'require' is missing"),
        ("require:\n  - max: 1\n", "2:5", "the key 'metric' is missing"),
        ("- kl.mean\n", "1:1", "a gate is a mapping of keys such as alpha and require"),
        ("# nothing\n", "1:1", "the file is empty"),
        ("alpha: 0.1\nalpha: 0.2\n" + RULE, "2:1", "duplicate key 'alpha', first set on line 1"),
        ("require: &a []\n", "1:10", "anchors and aliases are not allowed"),
        ("require: !!python/name:os.system\n", "1:10", "is not allowed"),
        ("require: [\n", "2:1", "not YAML"),
    ],
)
def test_a_mistake_is_told_at_its_line_and_column(text: str, place: str, message: str) -> None:
    error = refused(text)
    assert message in error.message
    assert error.where == f"g.yaml:{place}"


def test_a_missing_file_names_the_nearest_shipped_gate(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "strct.yaml", "no such gate file; the built-in one is called 'strict'"),
        (tmp_path, "a folder, not a gate file"),
    ):
        with pytest.raises(GateError, match=message) as caught:
            find_gate(str(path))
        assert caught.value.where == str(path)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in refused('require:\n  - {metric: "\\e[31mred", max: 1}\n').one_line()


KEYS = st.sampled_from(
    ["version", "alpha", "require", "metric", "max", "min", "test", "margin_points", "optional", "x"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*TEXT_FIELDS, "task.*", "mcnemar"])
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_any_tree_is_a_gate_or_a_gate_error(tree: dict[str, object]) -> None:
    try:
        gate = parse_gate(yaml.safe_dump(tree), "g.yaml", "g.yaml")
    except GateError as error:
        assert error.where is not None
        assert error.where.startswith("g.yaml")
    else:
        assert isinstance(gate, Gate)
