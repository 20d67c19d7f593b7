"""Prometheus metrics: the only importer of prometheus_client. docs/metrics.md lists them; what vLLM has bears its names."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector

from engine.client import EngineClient
from server.config import ServerConfig
from server.metrics.engine import EngineCollector
from server.metrics.exposition import choose_format
from server.metrics.families import Families, FixedInfo, LabelledCounter, ObservedHistogram, ReadGauge

_TTFT_BOUNDS_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_BOUNDS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_PHASE_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_REQUEST_BOUNDS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_LENGTH_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_CHOICES_BOUNDS = (1, 2, 5, 10, 20, 50, 100)

_FINISH_REASONS = ("stop", "length", "abort", "error")
_SHED_REASONS = ("open_requests", "waiting_requests", "waiting_tokens", "waiting_time")
_DEADLINES = ("timeout", "first_token_timeout")


class Finished(NamedTuple):
    """A request whose choices have all ended by themselves. Numbers of tokens are of all its prompts and choices; longest: of
    one choice. max_tokens: 0 where none was wanted."""

    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    longest: int
    max_tokens: int
    n: int


class Metrics:
    """All metrics of one server, in a registry of its own. Times in seconds.

    key_ids: those that requests may be counted for, none on a server without keys; version: Octavo's.
    """

    def __init__(self, client: EngineClient, config: ServerConfig, key_ids: Collection[str] = (), version: str = "") -> None:
        self._registry = CollectorRegistry()
        self._families = Families(config.metrics_prefix, config.model_names[0])
        self._registry.register(EngineCollector(self._families, client, config))
        self._add_latencies()
        self._add_lengths()
        self._add_counters(key_ids)
        build = {"version": version, "python_version": platform.python_version()}
        self._registry.register(FixedInfo(self._families, "build", "What runs.", build))
        ProcessCollector(registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Callable[[float], None]:
        histogram = ObservedHistogram(self._families, name, text, bounds)
        self._registry.register(histogram)
        return histogram.observe

    def _counter(
        self, name: str, text: str, labels: Sequence[str] = (), known: Collection[tuple[str, ...]] = ()
    ) -> LabelledCounter:
        counter = LabelledCounter(self._families, name, text, labels, known)
        self._registry.register(counter)
        return counter

    def _add_latencies(self) -> None:
        histogram = self._histogram
        self.observe_first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BOUNDS_S)
        self.observe_inter_token = histogram(
            "inter_token_latency_seconds", "Between two outputs of one choice.", _TOKEN_BOUNDS_S
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "A choice's time for each token after its first.", _TOKEN_BOUNDS_S
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BOUNDS_S)
        self._queue = histogram("request_queue_time_seconds", "A prompt's time in the engine's queue.", _PHASE_BOUNDS_S)
        self._prefill = histogram("request_prefill_time_seconds", "From there to its first token.", _PHASE_BOUNDS_S)
        self._decode = histogram("request_decode_time_seconds", "A choice's first token to its last.", _REQUEST_BOUNDS_S)
        self._inference = histogram("request_inference_time_seconds", "Prefill and decode of a choice.", _REQUEST_BOUNDS_S)

    def _add_lengths(self) -> None:
        histogram = self._histogram
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _LENGTH_BOUNDS)
        self._output_tokens = histogram("request_generation_tokens", "Tokens generated for a request.", _LENGTH_BOUNDS)
        self._computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that no cache served.", _LENGTH_BOUNDS
        )
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest choice.", _LENGTH_BOUNDS)
        self._max_tokens = histogram("request_params_max_tokens", "Bound on a choice's tokens.", _LENGTH_BOUNDS)
        self._n = histogram("request_params_n", "Choices asked for.", _CHOICES_BOUNDS)

    def _add_counters(self, key_ids: Collection[str]) -> None:
        counter = self._counter
        self._finished = counter("request_success", "Choices that ended.", ["finished_reason"], _each(_FINISH_REASONS))
        self._aborts = counter("request_aborts", "Requests whose client went away.", known=[()])
        self._shed = counter("requests_shed", "Requests refused for load.", ["reason"], _each(_SHED_REASONS))
        self._refused = counter("connections_refused", "Connections beyond those that are served.", known=[()])
        self._late = counter("deadlines_exceeded", "Requests whose time was up.", ["kind"], _each(_DEADLINES))
        self._responses = counter("http_responses", "Responses by API key.", ["api_key_id", "status"])
        keys = _each(key_ids or [""])
        self._key_prompt_tokens = counter("api_key_prompt_tokens", "Prompt tokens by API key.", ["api_key_id"], keys)
        self._key_output_tokens = counter("api_key_generation_tokens", "Tokens generated by API key.", ["api_key_id"], keys)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody scrapes."""
        self._registry.register(ReadGauge(self._families, name, text, read))

    def observe_response(self, key_id: str, status: int) -> None:
        """key_id: "" on a server without keys, "invalid" for requests without a right one."""
        self._responses.add(key_id, str(status))

    def observe_shed(self, reason: str) -> None:
        """A request got a 429. reason: open_requests, waiting_requests, waiting_tokens or waiting_time."""
        self._shed.add(reason)

    def observe_refused_connection(self) -> None:
        """A connection too many was closed, and nothing of it was read."""
        self._refused.add()

    def observe_deadline(self, kind: str | None) -> None:
        """A request ended by its time limit. kind: timeout or first_token_timeout."""
        self._late.add(kind or "")

    def observe_prompt(self, queue_s: float | None, prefill_s: float | None) -> None:
        """A prompt has its first token, or its embedding. None where an engine that died had it before."""
        if queue_s is not None and prefill_s is not None:
            self._queue(queue_s)
            self._prefill(prefill_s)

    def observe_choice(self, reason: str, prefill_s: float | None, decode_s: float, num_tokens: int) -> None:
        """A choice has ended by itself. reason: stop or length."""
        self._finished.add(reason)
        self._decode(decode_s)
        if prefill_s is not None:
            self._inference(prefill_s + decode_s)
        if num_tokens > 1:
            self._tpot(decode_s / (num_tokens - 1))

    def observe_finish(self, reason: str) -> None:
        """A choice or an input has ended of which there is no more to tell. reason: stop, abort or error."""
        self._finished.add(reason)

    def observe_abort(self) -> None:
        """A request's client went away."""
        self._aborts.add()

    def observe_request(self, request: Finished) -> None:
        self._e2e(request.seconds)
        self._prompt_tokens(request.num_prompt_tokens)
        self._computed(request.num_prompt_tokens - request.num_cached_tokens)
        self._output_tokens(request.num_output_tokens)
        self._n(request.n)
        if request.max_tokens:
            self._max_tokens(request.max_tokens)
            self._longest(request.longest)

    def observe_tokens(self, key_id: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """What a key's request came to, however it ended. key_id: "" on a server without keys."""
        self._key_prompt_tokens.add(key_id, amount=num_prompt_tokens)
        self._key_output_tokens.add(key_id, amount=num_output_tokens)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All of them, in the format for a scraper with this Accept header, and the content type."""
        write, content_type = choose_format(accept)
        return write(self._registry.collect()), content_type


def _each(values: Collection[str]) -> list[tuple[str, ...]]:
    return [(value,) for value in values]
