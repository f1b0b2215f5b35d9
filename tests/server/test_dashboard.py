"""The Grafana dashboard asks for what the server counts, and for all of the figures that matter."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from quantlab.runtime.options import EngineStats
from quantlab.server.metrics import PREFIX, Metrics

WANTED = ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
          "generation_tokens", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits", "num_preemptions",
          "admission_rejections", "request_queue_time_seconds")  # fmt: skip


@pytest.fixture(scope="module")
def dashboard(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "examples" / "grafana" / "quantlab.json").read_text())


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_name_is_one_that_the_server_has(dashboard: dict[str, Any]) -> None:
    metrics = Metrics("model")
    metrics.observe_engine(EngineStats, lambda: None)
    metrics.ended("stop")
    metrics.refused("requests")
    metrics.answered("/v1/completions", 200)
    samples = {s.name for family in text_string_to_metric_families(metrics.text().decode()) for s in family.samples}
    asked = {name for text in expressions(dashboard) for name in re.findall(rf"{PREFIX}[a-z0-9_]+", text)}
    assert len(asked) > 20
    assert asked <= samples


@pytest.mark.parametrize("name", WANTED)
def test_what_matters_is_shown(name: str, dashboard: dict[str, Any]) -> None:
    assert any(f"{PREFIX}{name}" in text for text in expressions(dashboard))


def test_panels_have_names_and_do_not_lie_over_each_other(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart or above
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
