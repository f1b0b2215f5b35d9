"""The server's counts in Prometheus' format, under the names that the field's dashboards know, prefix `quantlab:`.

What the engine counts is read when it is asked for; what a client sees (first token, next token, end) is measured here,
in the front process. Knows nothing about routes.
"""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quantlab.runtime.options import EngineInfo, EngineStats

PREFIX: Final = "quantlab:"
FAST: Final = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
SLOW: Final = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
LONG: Final = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
COUNTS: Final = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
SMALL: Final = (1, 2, 5, 10, 20, 50, 100)
GAUGES: Final[dict[str, tuple[str, Callable[[EngineStats], float]]]] = {
    "num_requests_running": ("Sequences in the running batch.", lambda s: s.running),
    "num_requests_waiting": ("Sequences that wait in the engine.", lambda s: s.waiting),
    "num_tokens_waiting": ("Prompt tokens of sequences that wait in the engine.", lambda s: s.waiting_tokens),
    "kv_cache_usage_perc": (
        "Part of the KV blocks in use, from 0 to 1.",
        lambda s: 1 - s.blocks_free / s.blocks_total if s.blocks_total else 0.0,
    ),
    "kv_blocks_free": ("KV blocks that are free or hold only cached prefixes.", lambda s: s.blocks_free),
    "kv_blocks": ("KV blocks.", lambda s: s.blocks_total),
}
COUNTERS: Final[dict[str, tuple[str, Callable[[EngineStats], float]]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
    "num_preemptions": ("Sequences that lost their KV blocks and began anew.", lambda s: s.preemptions),
    "recomputed_tokens": ("Tokens computed a second time after a preemption.", lambda s: s.recomputed_tokens),
    "prompt_tokens": ("Prompt tokens computed or found in the cache.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
}


class Metrics:
    """All metrics of one server; histograms and counters below are children with the model's name set."""

    def __init__(self, model: str):
        disable_created_metrics()  # a time of creation beside each series says nothing here
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = model
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to the first token.", SLOW)
        self.inter_token = self._histogram("inter_token_latency_seconds", "From a token to the next.", FAST)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a sequence.", FAST
        )
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Arrival to the last token.", LONG)
        self.queue = self._histogram("request_queue_time_seconds", "Wait in the engine before the first step.", LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", "Arrival to first token, less the wait.", LONG)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token.", LONG)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self.generation_tokens = self._histogram("request_generation_tokens", "Tokens of an answer.", COUNTS)
        self.choices = self._histogram("request_params_n", "n of a request.", SMALL)
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens that came from the cache.")
        self.restarts = self._counter("engine_restarts", "Engines started after one died.")
        self._ended = self._labelled("request_success", "Sequences that ended, by how.", "finished_reason")
        self._refused = self._labelled("admission_rejections", "Requests refused, by the limit.", "reason")
        self._answers = Counter(
            f"{PREFIX}http_requests", "Answers by route and status.", ("route", "status"), registry=self.registry
        )

    def observe_engine(self, stats: Callable[[], EngineStats], info: Callable[[], EngineInfo | None]) -> None:
        """Show the engine's own counts from now on."""
        self.registry.register(_EngineCounts(self._model, stats, info))

    def ended(self, reason: str) -> None:
        """A sequence ended."""
        self._ended.labels(self._model, reason).inc()

    def refused(self, reason: str) -> None:
        """A request was not let in."""
        self._refused.labels(self._model, reason).inc()

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered; `route` is a pattern, never what a client made up."""
        self._answers.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"{PREFIX}{name}", what, ("model_name",), buckets=buckets, registry=self.registry)
        return made.labels(self._model)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"{PREFIX}{name}", what, ("model_name",), registry=self.registry).labels(self._model)

    def _labelled(self, name: str, what: str, label: str) -> Counter:
        return Counter(f"{PREFIX}{name}", what, ("model_name", label), registry=self.registry)


class _EngineCounts(Collector):
    """The engine's stats and facts as metrics."""

    def __init__(self, model: str, stats: Callable[[], EngineStats], info: Callable[[], EngineInfo | None]):
        self._model = model
        self._stats = stats
        self._info = info

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        stats, info = self._stats(), self._info()
        yield _gauge("engine_up", "1 while the engine takes work.", ("model_name",), (self._model,), info is not None)
        for name, (what, value) in GAUGES.items():
            yield _gauge(name, what, ("model_name",), (self._model,), value(stats))
        for name, (what, value) in COUNTERS.items():
            counter = CounterMetricFamily(f"{PREFIX}{name}", what, labels=("model_name",))
            counter.add_metric((self._model,), value(stats))
            yield counter
        if info is not None:
            facts = {
                "model_name": self._model,
                "block_size": str(info.block_size),
                "num_gpu_blocks": str(info.num_blocks),
                "cache_dtype": info.kv_dtype,
                "scheme": info.scheme,
                "device": info.device,
            }
            yield _gauge("cache_config_info", "How keys and values are kept.", tuple(facts), tuple(facts.values()), 1)


def _gauge(name: str, what: str, labels: tuple[str, ...], values: tuple[str, ...], value: float) -> Metric:
    gauge = GaugeMetricFamily(f"{PREFIX}{name}", what, labels=labels)
    gauge.add_metric(values, float(value))
    return gauge
