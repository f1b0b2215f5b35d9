"""Two models on the same items: what flipped, what changed, and how sure one can be."""

import hashlib

import pytest
from pydantic import ValidationError

from quantlab.eval.outcomes import SHOWN_CHARS, SHOWN_FLIPS, TaskOutcome, compare_tasks, task_noise
from quantlab.eval.statistics import difference_interval, mcnemar_worse, smallest_drop


def outcome(right: str, answers: str | None = None, data: str = "d") -> TaskOutcome:
    """One digit an item: 1 right, 0 wrong; one letter an answer."""
    count = len(right)
    return TaskOutcome(
        task="quiz",
        metric="acc",
        data=hashlib.sha256(data.encode()).hexdigest(),
        items=tuple(hashlib.sha256(f"{data}{i}".encode()).hexdigest()[:32] for i in range(count)),
        right=tuple(int(digit) for digit in right),
        answers=tuple(answers or right),
        prompts=tuple(f"question {i}" for i in range(count)),
    )


def test_flips_are_counted_in_both_directions():
    found = compare_tasks(outcome("1111000011"), outcome("1100001111"), 0.05)
    assert (found.items, found.right_to_wrong, found.wrong_to_right) == (10, 2, 2)
    found = compare_tasks(outcome("1111000011"), outcome("0001000010"), 0.05)
    assert (found.right_to_wrong, found.wrong_to_right) == (4, 0)
    assert (found.baseline.value, found.candidate.value) == (0.6, 0.2)
    assert found.difference.value == pytest.approx(-0.4)
    assert found.difference.standard_error == pytest.approx((0.24 / 9) ** 0.5)
    assert found.mcnemar_p == mcnemar_worse(4, 0) == pytest.approx(1 / 16)
    assert (found.low, found.high) == difference_interval(4, 0, 10)
    assert found.smallest_drop == smallest_drop(10, 0.4, 0.05, 0.8)


def test_answers_change_without_being_right():
    found = compare_tasks(outcome("1000", "abcd"), outcome("1000", "abxy"), 0.05)
    assert (found.answers_changed, found.right_to_wrong, found.wrong_to_right, found.flips) == (2, 0, 0, ())


def test_a_flip_shows_the_question_and_both_answers():
    (flip,) = compare_tasks(outcome("110", "abc"), outcome("100", "axc"), 0.05).flips
    assert (flip.index, flip.prompt, flip.baseline, flip.candidate, flip.was_right) == (1, "question 1", "b", "x", True)


def test_long_texts_are_cut_where_they_are_shown_and_compared_whole():
    long = outcome("1").model_copy(update={"answers": ("a" * 500 + "b",), "prompts": ("p" * 500 + "?",)})
    other = long.model_copy(update={"answers": ("a" * 500 + "c",), "right": (0,)})
    found = compare_tasks(long, other, 0.05)
    assert found.answers_changed == 1
    (flip,) = found.flips
    assert {len(text) for text in (flip.prompt, flip.baseline, flip.candidate)} == {SHOWN_CHARS}
    assert flip.prompt.startswith("...p") and flip.prompt.endswith("p?")
    assert flip.baseline.startswith("aa") and flip.baseline.endswith("a...")


def test_only_the_first_flips_are_kept():
    found = compare_tasks(outcome("1" * 50), outcome("0" * 50), 0.05)
    assert [flip.index for flip in found.flips] == list(range(SHOWN_FLIPS))
    assert found.right_to_wrong == 50


def test_models_on_other_items_are_never_compared():
    with pytest.raises(AssertionError, match="the same items"):
        compare_tasks(outcome("10"), outcome("10", data="e"), 0.05)
    with pytest.raises(AssertionError, match="the same items"):
        task_noise(outcome("10"), outcome("10", data="e"))


def test_noise_is_counted_over_the_items_that_both_runs_have():
    noise = task_noise(outcome("110011"), outcome("100"))
    assert (noise.name, noise.items, noise.flips) == ("quiz", 3, 1)
    assert task_noise(outcome("1"), outcome("1")).flips == 0


def test_an_outcome_survives_json_and_refuses_what_does_not_fit():
    found = outcome("101")
    assert TaskOutcome.model_validate_json(found.model_dump_json()) == found
    for change in ({"right": [1, 0]}, {"right": [1, 0, 2]}, {"data": "x"}, {"answers": []}, {"extra": 1}):
        with pytest.raises(ValidationError):
            TaskOutcome.model_validate(found.model_dump() | change)
    with pytest.raises(ValidationError, match="every item has one entry"):
        TaskOutcome.model_validate(found.model_dump() | dict.fromkeys(("items", "right", "answers", "prompts"), ()))
