"""/metrics: every documented name is there, and counts are what happened."""

import re
from pathlib import Path

import pytest

from tests.server.serving import Server


def documented(repository: Path) -> set[str]:
    """The names in the manual's table of metrics."""
    section = (repository / "docs" / "server.md").read_text().partition("## Metrics")[2]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`([a-z0-9_]+)(?:\{[a-z,_]*\})?`", row)} - {"_total"}


def test_every_documented_metric_is_there_and_every_other_is_documented(server: Server, repository: Path) -> None:
    server.complete("It was", max_tokens=2)
    shown = set(re.findall(r"^# TYPE quantlab:(\w+) ", server.http.get("/metrics").text, re.MULTILINE))
    assert documented(repository) == {name.removesuffix("_total") for name in shown}


def test_counts_are_what_happened(server: Server) -> None:
    names = (
        "request_success_total",
        "generation_tokens_total",
        "prompt_tokens_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
        "request_params_n_count",
    )
    before = {name: server.metric(name) for name in names}
    server.complete("It was a dark", n=2, max_tokens=3)
    gained = {name: server.metric(name) - before[name] for name in names}
    assert gained == dict(zip(names, (2, 6, 8, 2, 4, 2, 2, 1), strict=True))


def test_routes_are_counted_by_their_pattern_whatever_clients_ask(server: Server) -> None:
    for path in ("/v1/models/books-5m", "/v1/models/other", "/made/up/1", "/made/up/2"):
        server.http.get(path)
    text = server.http.get("/metrics").text
    assert 'route="/v1/models/{model:path}",status="404"' in text
    assert 'route="unknown",status="404"' in text
    assert "made" not in text


@pytest.mark.parametrize("name", ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"])
def test_an_idle_server_says_so(server: Server, name: str) -> None:
    server.until(lambda: server.metric(name) == 0)
    assert server.metric("engine_up") == 1
