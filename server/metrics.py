"""Prometheus metrics: the only importer of prometheus_client. Names are vLLM's behind the prefix `octavo_`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.messages import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_ITL_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_E2E_BUCKETS_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Sequences that the engine is computing.", lambda s: s.num_running),
    ("num_requests_waiting", "Requests queued in the engine.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", lambda s: s.num_referenced_blocks / max(s.num_blocks, 1)),
    ("kv_cache_cached_blocks", "Free KV pages whose content can be found again.", lambda s: s.num_cached_blocks),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("prompt_tokens", "Prompt tokens of the requests admitted.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens generated.", lambda s: s.generation_tokens),
    ("prefix_cache_hits", "Prompt tokens that the prefix cache served.", lambda s: s.cached_prompt_tokens),
    ("num_preemptions", "Sequences that had to give their pages back.", lambda s: s.preemptions),
    ("recomputed_tokens", "Tokens computed again after preemption.", lambda s: s.recomputed_tokens),
    ("engine_computed_tokens", "Tokens that went through the model.", lambda s: s.computed_tokens),
    ("engine_steps", "Engine steps.", lambda s: s.steps),
)


class _EngineCollector(Collector):
    """Reads the engine's numbers when somebody scrapes, so that nothing has to be copied in between."""

    def __init__(self, model_name: str, read_stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._read_stats = read_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._read_stats()
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"octavo_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], read(stats))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"octavo_{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], read(stats))
            yield counter


class _ReadCounter(Collector):
    """A counter that somebody else keeps, read when somebody scrapes."""

    def __init__(self, name: str, text: str, model_name: str, read: Callable[[], float], registry: CollectorRegistry) -> None:
        self._name, self._text, self._model_name, self._read = name, text, model_name, read
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=["model_name"])
        family.add_metric([self._model_name], self._read())
        yield family


class _Histogram(Collector):
    """A histogram cheap enough for every token: a search and two additions, where the library's own walks through the buckets
    and takes two locks. Observed and scraped on one thread, the event loop's.
    """

    def __init__(self, name: str, text: str, model_name: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """bounds: the largest value of each bucket, ascending."""
        self._name, self._text, self._model_name = name, text, model_name
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        names = map(floatToGoString, (*self._bounds, float("inf")))
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        family.add_metric([self._model_name], buckets, self._sum)
        yield family


class Metrics:
    """All metrics of one server, in a registry of its own. Times in seconds."""

    def __init__(self, model_name: str, read_stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, read_stats))
        self._model_name = model_name

        def histogram(name: str, text: str, bounds: Sequence[float]) -> _Histogram:
            return _Histogram(f"octavo_{name}", text, model_name, bounds, self._registry)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS_S)
        itl = histogram("inter_token_latency_seconds", "Between two outputs of one choice.", _ITL_BUCKETS_S)
        self.observe_inter_token = itl.observe  # for every token, so without a call between
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _E2E_BUCKETS_S)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS)
        self._finished = Counter(
            "octavo_request_success", "Choices finished.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._shed = Counter(
            "octavo_requests_shed", "Requests refused for load.", ["model_name", "reason"], registry=self._registry
        )
        self._late = Counter(
            "octavo_deadlines_exceeded", "Requests whose time was up.", ["model_name", "kind"], registry=self._registry
        )
        self._responses = Counter(
            "octavo_http_responses", "Responses by API key.", ["model_name", "api_key_id", "status"], registry=self._registry
        )

    def observe_response(self, key_id: str, status: int) -> None:
        """key_id: "" on a server without keys, "invalid" for requests without a right one."""
        self._responses.labels(self._model_name, key_id, str(status)).inc()

    def observe_shed(self, reason: str) -> None:
        """A request got a 429. reason: open_requests, waiting_requests or waiting_tokens."""
        self._shed.labels(self._model_name, reason).inc()

    def observe_deadline(self, kind: str | None) -> None:
        """A request ended by its time limit. kind: timeout or first_token_timeout."""
        self._late.labels(self._model_name, kind or "").inc()

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody scrapes."""
        gauge = Gauge(f"octavo_{name}", text, ["model_name"], registry=self._registry)
        gauge.labels(self._model_name).set_function(read)

    def add_counter(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A counter that is kept elsewhere."""
        _ReadCounter(f"octavo_{name}", text, self._model_name, read, self._registry)

    def observe_first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def observe_finish(self, reason: str) -> None:
        """reason: stop, length, abort or error; one call a choice."""
        self._finished.labels(self._model_name, reason).inc()

    def observe_request(self, seconds: float, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """A request whose choices have all finished."""
        self._e2e.observe(seconds)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._output_tokens.observe(num_output_tokens)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)
