"""A whole load test against a scripted server: figures that the script makes known, and servers that are none."""

import json
from dataclasses import replace
from typing import Any

import pytest

from quantlab.bench.serve import run_load
from quantlab.bench.serve_options import Level, Limits, LoadOptions, Span, Target, Work
from quantlab.bench.serve_result import SCHEMA, LoadResult
from quantlab.errors import EndpointError
from tests.bench.openai_script import Script, serving


def measured(script: Script, **changes: Any) -> LoadResult:
    """Two small loads on the script's server."""
    target = Target(script.url, api_key=script.key, timeout=10)
    levels = (Level(concurrency=1), Level(concurrency=4))
    options = LoadOptions(target, levels, Work(Span(60, 60), Span(3, 6)), requests=12, warmup=2)
    return run_load(replace(options, **changes), lambda level: None)


def test_figures_are_those_of_the_script() -> None:
    with serving(Script(first=0.03, gap=0.005, gauges=True)) as script:
        result = measured(script)
    one, four = result.levels
    assert (result.server.model, result.server.version, result.server.card["max_model_len"]) == (
        "scripted", "1.2.3", 4096,
    )  # fmt: skip
    assert (one.sent, one.succeeded, four.succeeded) == (12, 12, 12)
    assert one.ttft.p50 >= 0.03 and one.itl.p50 >= 0.005
    assert one.prompt_tokens / 12 == pytest.approx(60, abs=2)
    sent = script.bodies[8:20]  # after six probes and two to warm up
    assert one.output_tokens == sum(body["max_tokens"] for body in sent)
    assert script.most_under_way == 4
    assert four.seconds < one.seconds
    assert one.server and {sample.waiting for sample in one.server} == {2.0}
    assert {sample.kv_usage for sample in four.server} == {0.25}


def test_a_server_that_does_not_speak_of_itself_is_measured_all_the_same() -> None:
    with serving(Script(usage=False)) as script:
        result = measured(script)
    assert not result.tokens_per_word.measured
    assert all(level.succeeded == 12 and not level.counted_by_server and not level.server for level in result.levels)


def test_failures_do_not_end_a_load() -> None:
    with serving(Script(fail={9: "429", 10: "drop", 11: "broken"})) as script:
        result = measured(script)
    assert result.levels[0].failures == {
        "HTTP 429: the queue is full": 1, "connection lost": 1, "stream: an event that is no JSON": 1,
    }  # fmt: skip
    assert result.levels[0].succeeded == 9


def test_the_json_holds_everything_but_the_key() -> None:
    with serving(Script(key="s3cret")) as script:
        result = measured(script, limits=Limits(ttft=5.0))
    read = json.loads(result.to_json())
    assert read["schema"] == SCHEMA
    assert read["levels"][1]["goodput"] == pytest.approx(12 / read["levels"][1]["seconds"])
    assert read["options"]["limits"]["ttft"] == 5.0
    assert "s3cret" not in result.to_json()


def test_nobody_there() -> None:
    with pytest.raises(EndpointError, match="cannot be reached: Connection refused$"):
        measured(Script(url="http://127.0.0.1:9/v1"))


def test_a_model_that_the_server_does_not_have() -> None:
    with serving(Script()) as script, pytest.raises(EndpointError) as caught:
        measured(script, target=Target(script.url, model="other"))
    assert caught.value.fix == "--model scripted"


def test_a_server_that_wants_a_key() -> None:
    with serving(Script(key="s3cret")) as script, pytest.raises(EndpointError, match="wants a key") as caught:
        measured(script, target=Target(script.url))
    assert caught.value.fix is not None and "--api-key KEY" in caught.value.fix
    with serving(Script(key="s3cret")) as script, pytest.raises(EndpointError, match="wants another key"):
        measured(script, target=Target(script.url, api_key="wrong"))


def test_a_page_that_is_no_such_server() -> None:
    with serving(Script()) as script, pytest.raises(EndpointError, match="no list of models"):
        measured(script, target=Target(script.url + "/nothing"))


def test_the_first_request_shows_what_is_wrong() -> None:
    with serving(Script(fail={0: "500"})) as script, pytest.raises(EndpointError, match="HTTP 500"):
        measured(script)


def test_no_success_is_no_result() -> None:
    with serving(Script(fail=dict.fromkeys(range(6, 99), "429"))) as script, pytest.raises(EndpointError, match="429"):
        measured(script)
