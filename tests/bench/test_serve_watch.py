"""A server's own gauges, whatever prefix stands before them."""

import pytest

from quantlab.bench.serve_watch import parse_gauges

PAGE = """# HELP vllm:num_requests_running Requests running.
# TYPE vllm:num_requests_running gauge
{prefix}num_requests_running{{engine="0",model_name="a{{b}}"}} 3.0
{prefix}num_requests_waiting {waiting}
{prefix}kv_cache_usage_perc{{engine="0"}} 2.5e-01
other_total 9
"""


@pytest.mark.parametrize("prefix", ["vllm:", "quantlab:", ""])
def test_gauges_are_read(prefix: str) -> None:
    page = PAGE.format(prefix=prefix, waiting="4").replace("a{b}", "a")
    assert parse_gauges(page) == (3.0, 4.0, 0.25)


def test_engines_count_together() -> None:
    page = PAGE.format(prefix="vllm:", waiting="4").replace("a{b}", "a")
    assert parse_gauges(page + page.replace(" 3.0", " 1.0").replace("2.5e-01", "0.75")) == (4.0, 8.0, 0.5)


@pytest.mark.parametrize("page", ["", "<html>", "vllm:num_requests_running 1\n"])
def test_a_page_without_them_is_none(page: str) -> None:
    assert parse_gauges(page) is None
