"""Loads and lengths as the user writes them, and what cannot be meant."""

from pathlib import Path

import pytest

from quantlab.bench.serve_options import Level, LoadOptions, Span, Target, Work, parse_levels
from quantlab.errors import UsageError


def test_lengths_are_a_number_or_a_range() -> None:
    assert Span.parse("128", "--input") == Span(128, 128)
    assert Span.parse("64:256", "--input") == Span(64, 256)
    assert (str(Span(128, 128)), str(Span(64, 256))) == ("128", "64:256")


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "64:", ":64", "256:64", "1e3", "1:2:3", "9" * 40, "٣"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Span.parse(text, "--input")
    assert caught.value.where == "--input"


def test_levels_are_closed_or_open_loops() -> None:
    assert parse_levels("1,8", None) == (Level(concurrency=1), Level(concurrency=8))
    assert parse_levels(None, "0.5,4") == (Level(rate=0.5), Level(rate=4.0))
    assert [level.name for level in (Level(concurrency=8), Level(rate=0.5))] == ["8 concurrent", "0.5 a second"]


@pytest.mark.parametrize(
    ("concurrency", "rate"),
    [(None, None), ("1", "1"), ("0", None), ("1.5", None), ("x", None), (None, "0"), (None, "nan"), (None, "1e9")],
)
def test_levels_that_cannot_be_meant(concurrency: str | None, rate: str | None) -> None:
    with pytest.raises(UsageError):
        parse_levels(concurrency, rate)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://"])
def test_an_address_must_be_http(url: str) -> None:
    with pytest.raises(UsageError):
        Target(url)


@pytest.mark.parametrize("base", ["http://host:1/v1", "http://host:1/v1/", "http://host:1", "http://host:1/"])
def test_the_address_may_end_with_v1_or_without(base: str) -> None:
    target = Target(base)
    assert (target.root, target.url("models")) == ("http://host:1", "http://host:1/v1/models")


def test_counts_have_bounds() -> None:
    target, level = Target("http://host/v1"), (Level(concurrency=1),)
    for wrong in ({"levels": ()}, {"requests": 0}, {"levels": level * 33}):
        with pytest.raises(UsageError):
            LoadOptions(**{"target": target, "levels": level, **wrong})
    with pytest.raises(UsageError):
        Work(prompts=Path("x.txt"), shared_prefix=5)
