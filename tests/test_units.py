"""Sizes, counts and durations: short, and rounded across their units' borders."""

from collections.abc import Callable

import pytest

from quantlab.units import human_bytes, human_count, human_seconds


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (human_bytes, 0, "0 B"),
        (human_bytes, 999, "999 B"),
        (human_bytes, 5_830_000, "5.83 MB"),
        (human_bytes, 999_950, "1 MB"),
        (human_bytes, 2.5e12, "2.5 TB"),
        (human_count, 260_000, "260k"),
        (human_count, 1.24e9, "1.24B"),
        (human_seconds, 0.44, "0.4s"),
        (human_seconds, 9.97, "10s"),
        (human_seconds, 59.7, "1m 00s"),
        (human_seconds, 187, "3m 07s"),
        (human_seconds, 7500, "2h 05m"),
    ],
)
def test_numbers_are_short(show: Callable[[float], str], value: float, text: str) -> None:
    assert show(value) == text
