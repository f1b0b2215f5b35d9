"""Verdicts: what passes, what fails, what cannot be told, and what may not be asked."""

import math

import pytest

from quantlab.errors import GateError
from quantlab.eval.gate import check_measurable, judge, worst
from quantlab.eval.gate_file import Gate, default_gate, find_gate, parse_gate
from quantlab.eval.metrics import available
from quantlab.eval.result import Estimate, GateLine, GateResult
from tests.eval.outcomes import noise_floor, task_result, text_result

# Items of the eight tasks of the bundled suite.
SUITE = {
    "lambada_openai": 5_153, "piqa": 1_838, "arc_easy": 2_376, "winogrande": 1_267, "boolq": 3_270, "copa": 100,
    "openbook_qa": 500, "hellaswag": 1_000,
}  # fmt: skip


def gate(*rules: str, alpha: float = 0.05) -> Gate:
    """A gate of rules in YAML's flow style."""
    lines = "".join(f"  - {{{rule}}}\n" for rule in rules)
    return parse_gate(f"alpha: {alpha}\nrequire:\n{lines}", "g.yaml", "g.yaml")


def mean(value: float, error: float | None = 0.001, clusters: int = 40) -> Estimate:
    """A clustered mean."""
    return Estimate(value=value, standard_error=error, clusters=clusters)


def model(ratio: float, kl: float, flip_rate: float, loss: float) -> GateResult:
    """The default gate on a model with these figures on 40 windows of text and the bundled suite."""
    text = text_result(log_ratio=mean(math.log(ratio), 0.04 * (ratio - 1.0)), kl=mean(kl, 0.02 * kl))
    tasks = [
        task_result(name, round(items * (flip_rate + loss) / 2), round(items * (flip_rate - loss) / 2), items)
        for name, items in SUITE.items()
    ]
    return judge(default_gate(), [text], tasks, None)


def only(result: GateResult) -> GateLine:
    """The one line of a result."""
    (line,) = result.lines
    assert result.verdict == line.verdict
    return line


def test_the_default_gate_passes_a_sound_int8_and_a_sound_int4() -> None:
    assert model(ratio=1.0015, kl=0.0022, flip_rate=0.03, loss=0.001).verdict == "pass"
    assert model(ratio=1.013, kl=0.015, flip_rate=0.07, loss=0.004).verdict == "pass"
    assert model(ratio=1.043, kl=0.048, flip_rate=0.13, loss=0.008).verdict == "pass"


def test_the_default_gate_fails_three_bits_of_plain_rounding() -> None:
    result = model(ratio=1.11, kl=0.13, flip_rate=0.2, loss=0.02)
    assert result.verdict == "fail"
    verdicts = {line.metric: line.verdict for line in result.lines}
    assert verdicts["text.books.ppl_ratio"] == verdicts["text.books.kl.mean"] == "fail"


def test_the_default_gate_fails_a_model_that_only_tasks_give_away() -> None:
    result = model(ratio=1.01, kl=0.01, flip_rate=0.12, loss=0.04)
    assert {line.metric for line in result.lines if line.verdict == "fail"} >= {"tasks.accuracy", "task.lambada_openai"}


def test_a_model_that_equals_its_baseline_passes_both_gates() -> None:
    same = mean(0.0, 0.0)
    tasks = [task_result(name, 0, 0, items) for name, items in SUITE.items()]
    for name in ("default", "strict"):
        assert judge(find_gate(name), [text_result(log_ratio=same, kl=same)], tasks, noise_floor()).verdict == "pass"


def test_text_alone_is_judged_when_no_task_was_run() -> None:
    result = judge(default_gate(), [text_result(log_ratio=mean(0.001), kl=mean(0.002))], [], None)
    assert [line.metric for line in result.lines] == ["text.books.ppl_ratio", "text.books.kl.mean"]
    assert (result.verdict, result.source, result.alpha) == ("pass", "default", 0.05)


@pytest.mark.parametrize(
    ("value", "verdict", "words"),
    [
        (1.00, "pass", "shown to be at most 1.05"),
        (1.04, "inconclusive", "times the text would settle it"),
        (1.05, "inconclusive", "too near the limit to tell"),
        (1.10, "fail", "shown to be above 1.05"),
    ],
)
def test_a_ratio_is_judged_by_both_bounds(value: float, verdict: str, words: str) -> None:
    line = only(
        judge(gate("metric: ppl_ratio, max: 1.05"), [text_result(log_ratio=mean(math.log(value), 0.01))], [], None)
    )
    assert (line.verdict, line.limit, line.metric) == (verdict, 1.05, "text.books.ppl_ratio")
    assert words in line.reason
    assert line.measured == pytest.approx(value)
    assert line.low is not None
    assert line.high is not None
    assert line.low == pytest.approx(value * math.exp(-0.01 * 1.684875), rel=1e-5)
    assert line.high == pytest.approx(value * math.exp(0.01 * 1.684875), rel=1e-5)
    assert (line.p_value is not None) and (line.p_value <= 0.05) == (verdict == "fail")


def test_few_windows_make_the_same_figures_inconclusive() -> None:
    many, few = (text_result(kl=mean(0.08, 0.008, clusters)) for clusters in (40, 3))
    rule = gate("metric: kl.mean, max: 0.1")
    assert judge(rule, [many], [], None).verdict == "pass"
    assert judge(rule, [few], [], None).verdict == "inconclusive"


def test_one_window_proves_nothing() -> None:
    line = only(judge(gate("metric: kl.mean, max: 0.1"), [text_result(kl=mean(9.0, None, 1))], [], None))
    assert (line.verdict, line.low, line.high) == ("inconclusive", None, None)
    assert "one window gives no standard error" in line.reason


def test_a_least_value_is_judged_from_below() -> None:
    rule = gate("metric: agreement, min: 0.9")
    for value, verdict in ((0.95, "pass"), (0.9, "inconclusive"), (0.85, "fail")):
        line = only(judge(rule, [text_result(agreement=mean(value, 0.005))], [], None))
        assert (line.verdict, line.requirement) == (verdict, "at least 0.9")


def test_an_order_statistic_is_a_plain_number() -> None:
    text = text_result(kl=mean(0.02))
    assert only(judge(gate("metric: kl.p99, max: 0.12"), [text], [], None)).verdict == "pass"
    line = only(judge(gate("metric: kl.p999, max: 0.19"), [text], [], None))
    assert (line.verdict, line.p_value, line.reason) == ("fail", None, "0.2: is above 0.19")


def test_bits_per_byte_are_the_ratio_in_other_units() -> None:
    text = text_result(log_ratio=mean(0.02, 0.001))
    line = only(judge(gate("metric: bits_per_byte_increase, max: 0.01"), [text], [], None))
    assert line.measured == pytest.approx(0.02 / 4 / math.log(2))
    assert line.high == pytest.approx((0.02 + 0.001 * 1.684875) / 4 / math.log(2), rel=1e-5)


def test_a_short_name_asks_for_every_text_and_a_long_one_for_its_own() -> None:
    texts = [text_result("wiki", kl=mean(0.01)), text_result("books", kl=mean(0.01))]
    both = judge(gate("metric: kl.mean, max: 0.1"), texts, [], None)
    assert [line.metric for line in both.lines] == ["text.wiki.kl.mean", "text.books.kl.mean"]
    assert both.lines == judge(gate("metric: text.*.kl.mean, max: 0.1"), texts, [], None).lines
    assert only(judge(gate("metric: text.books.kl.mean, max: 0.1"), texts, [], None)).metric == "text.books.kl.mean"


@pytest.mark.parametrize("name", ["task.*", "task.*.accuracy", "task.*.acc"])
def test_a_wildcard_makes_a_line_of_every_task(name: str) -> None:
    tasks = [task_result("piqa", 5, 5, 500), task_result("copa", 1, 1, 100)]
    result = judge(gate(f"metric: {name}, test: mcnemar"), [], tasks, None)
    assert [line.metric for line in result.lines] == ["task.piqa", "task.copa"]


@pytest.mark.parametrize(
    ("worse", "better", "items", "verdict", "words"),
    [
        (50, 50, 5_000, "pass", "shown to lose less than 1 point"),
        (5, 5, 100, "inconclusive", "100 items are too few: with as many flips, a candidate without loss needs about"),
        (115, 75, 5_000, "inconclusive", "the loss is too near 1 point for 5,000 items to tell"),
        (200, 50, 5_000, "fail", "shown to lose more than 1 point"),
    ],
)
def test_non_inferiority_has_three_ends(worse: int, better: int, items: int, verdict: str, words: str) -> None:
    rule = gate("metric: task.piqa, test: noninferiority, margin_points: 1")
    line = only(judge(rule, [], [task_result("piqa", worse, better, items)], None))
    assert (line.verdict, line.limit, line.requirement) == (verdict, -0.01, "loss below 1 point")
    assert line.measured == pytest.approx((better - worse) / items)
    assert words in line.reason


def test_mcnemar_fails_only_what_is_shown_and_states_its_power() -> None:
    rule = gate("metric: task.*, test: mcnemar")
    shown = only(judge(rule, [], [task_result("piqa", 40, 15, 1_000)], None))
    assert (shown.verdict, shown.p_value) == ("fail", pytest.approx(0.000505, rel=0.01))
    hidden = only(judge(rule, [], [task_result("piqa", 4, 1, 100)], None))
    assert hidden.verdict == "pass"
    assert "100 items show one of 6.63 points" in hidden.reason


def test_a_margin_moves_mcnemars_question() -> None:
    tasks = [task_result("piqa", 300, 200, 5_000)]  # a loss of 2 points
    for margin, verdict in ((0, "fail"), (1, "fail"), (1.9, "pass"), (3, "pass")):
        rule = gate(f"metric: task.piqa, test: mcnemar, margin_points: {margin}")
        assert judge(rule, [], tasks, None).verdict == verdict


def test_tasks_are_pooled_item_by_item() -> None:
    tasks = [task_result("piqa", 30, 10, 1_000), task_result("boolq", 10, 30, 3_000)]
    line = only(judge(gate("metric: tasks.accuracy, test: noninferiority, margin_points: 1"), [], tasks, None))
    assert (line.verdict, line.measured) == ("pass", 0.0)


def test_flips_and_floors_are_shares_of_items() -> None:
    task = task_result("piqa", 30, 20, 1_000, right=700)
    for rule, verdict in (
        ("metric: task.piqa.flips, max: 0.1", "pass"),
        ("metric: tasks.flips, max: 0.05", "inconclusive"),
        ("metric: task.*.flips, max: 0.02", "fail"),
        ("metric: task.piqa.acc, min: 0.6", "pass"),
        ("metric: task.piqa.accuracy, min: 0.71", "inconclusive"),
        ("metric: tasks.accuracy, min: 0.8", "fail"),
    ):
        assert judge(gate(rule), [], [task], None).verdict == verdict, rule


def test_many_looks_are_corrected_for() -> None:
    tasks = [task_result("t", 17, 6, 1_000)]  # p = 0.017
    more = tasks + [task_result(f"u{index}", 20, 20, 1_000) for index in range(7)]
    rule = gate("metric: task.*, test: mcnemar")
    assert judge(rule, [], tasks, None).lines[0].verdict == "fail"
    corrected = judge(rule, [], more, None).lines[0]
    assert corrected.verdict == "pass"
    assert corrected.p_value == pytest.approx(8 * 0.01734, rel=0.01)


def test_a_line_that_only_correction_saves_says_so() -> None:
    rules = ["metric: ppl_ratio, max: 1.05", *["metric: kl.mean, max: 0.1"] * 4]
    text = text_result(log_ratio=mean(math.log(1.05) + 0.002), kl=mean(0.01))
    line = judge(gate(*rules), [text], [], None).lines[0]
    assert line.verdict == "inconclusive"
    assert "above 1.05, but not once corrected for looking at many lines (p = 0.13)" in line.reason


def test_nothing_below_the_noise_floor_is_called_a_difference() -> None:
    text = text_result(log_ratio=mean(0.0005, 0.00001), kl=mean(0.0005, 0.00001))
    tasks = [task_result("piqa", 40, 15, 1_000)]
    rules = gate("metric: ppl_ratio, max: 1.0001", "metric: kl.mean, max: 0.0001", "metric: task.piqa, test: mcnemar")
    loud, quiet = noise_floor(log_ratio=-0.001, kl=0.001, flips=30), noise_floor(log_ratio=0.0001, kl=1e-5, flips=3)
    for noise, verdict in ((None, "fail"), (quiet, "fail"), (loud, "inconclusive")):
        result = judge(rules, [text], tasks, noise)
        assert [line.verdict for line in result.lines] == [verdict] * 3
        assert {line.below_noise for line in result.lines} == {verdict == "inconclusive"}
    assert all("no more than noise alone gives" in line.reason for line in result.lines)


def test_a_pass_within_the_noise_floor_says_so() -> None:
    text = text_result(kl=mean(0.0005, 0.00001))
    line = only(judge(gate("metric: kl.mean, max: 0.1"), [text], [], noise_floor(kl=0.001)))
    assert (line.verdict, line.below_noise) == ("pass", True)
    assert line.reason.endswith("(within the noise floor)")


def test_the_whole_is_its_worst_line() -> None:
    assert worst(["pass", "inconclusive", "fail"]) == "fail"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["pass"]) == "pass"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "metric: text.wikki.kl.mean, max: 1",
            "'text.wikki.kl.mean' is not measured, did you mean 'text.wiki.kl.mean'?",
        ),
        ("metric: task.piqa.acc_norm, test: mcnemar", "'task.piqa.acc_norm' is not measured, did you mean"),
        ("metric: task.arc_easy, test: mcnemar", "'task.arc_easy' is not measured"),
    ],
)
def test_an_unmeasured_metric_is_an_error_before_and_after_the_work(rule: str, message: str) -> None:
    asked = gate("metric: kl.mean, max: 1", rule)
    for ask in (
        lambda: check_measurable(asked, available(["wiki"], {"piqa": "acc"})),
        lambda: judge(asked, [text_result("wiki", kl=mean(0.1))], [task_result("piqa", 0, 0, 10)], None),
    ):
        with pytest.raises(GateError) as caught:
            ask()
        assert message in caught.value.message
        assert (caught.value.where, caught.value.exit_code) == ("g.yaml:4:5", 2)
        assert "\n" not in caught.value.one_line()


def test_a_task_rule_without_tasks_says_how_to_run_some() -> None:
    with pytest.raises(GateError) as caught:
        check_measurable(gate("metric: task.*, test: mcnemar"), available(["wiki"], {}))
    assert caught.value.fix == "add --tasks or --suite"


def test_a_gate_of_which_nothing_is_measured_is_an_error() -> None:
    with pytest.raises(GateError, match="nothing that this gate asks for is measured"):
        check_measurable(gate("metric: task.*, test: mcnemar, optional: true"), available(["wiki"], {}))


def test_what_will_be_measured_and_what_was_have_the_same_names() -> None:
    names = available(["books"], {"piqa": "acc"})
    check_measurable(default_gate(), names)
    for name in names:
        rule = "max: 1" if not name.startswith("task") or name.endswith("flips") else "min: 0"
        result = judge(gate(f"metric: {name}, {rule}"), [text_result()], [task_result("piqa", 1, 1, 100)], None)
        assert len(result.lines) == 1, name


def test_wild_windows_leave_finite_bounds() -> None:
    line = only(judge(gate("metric: ppl_ratio, max: 1.05"), [text_result(log_ratio=mean(5.0, 300.0, 2))], [], None))
    assert line.verdict == "inconclusive"
    assert line.high is not None
    assert math.isfinite(line.high)
    assert GateLine.model_validate_json(line.model_dump_json()) == line


def test_optional_lines_without_a_measurement_are_named_in_the_result() -> None:
    result = judge(default_gate(), [text_result(log_ratio=mean(0.01), kl=mean(0.01))], [], None)
    assert result.verdict == "pass" and result.left_out == ("tasks.accuracy", "task.*")


def test_an_optional_line_for_a_mistyped_task_does_not_vanish() -> None:
    asked = gate("metric: ppl_ratio, max: 1.1", "metric: task.piqqa, test: mcnemar, optional: true")
    result = judge(asked, [text_result(log_ratio=mean(0.01), kl=mean(0.01))], [task_result("piqa", 1, 1, 100)], None)
    assert result.left_out == ("task.piqqa",)
