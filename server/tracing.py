"""Traces over OTLP: the only importer of opentelemetry, imported only where `otlp_endpoint` is set.

A request is one server span, whose children queue, prefill and decode lie where the engine's times put them. All of it is made
when the request has ended, but for the ids, which its log lines carry. Names are OpenTelemetry's for HTTP and generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), and beside them vLLM's, for dashboards made for those. Nothing that a
client wrote is in a span: no prompt, no stop string, no message of an error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers

from server.request_record import Event, Phases, RequestRecord

logger = logging.getLogger("octavo.tracing")

CLOSE_TIMEOUT_S = 2.0
COMPLAINT_INTERVAL_S = 60.0

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_propagator = TraceContextTextMapPropagator()

Attributes = dict[str, AttributeValue]


class Tracing:
    """Sends the spans of all requests to one collector, from a thread of its own. What it cannot send in time is dropped.

    The standard OTEL_ variables hold for what this does not say: headers, service name, resource, sampler, batches.
    """

    def __init__(self, url: str, version: str) -> None:
        _complain_seldom()
        self._provider = TracerProvider(resource=_resource(version), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
        self._tracer = self._provider.get_tracer("octavo", version)

    def begin(self, record: RequestRecord, headers: Headers) -> RequestTrace:
        """The server span, a child of the client's where it names one in `traceparent`. Gives the record its trace_id."""
        parent = _propagator.extract(headers, Context())
        at_ns = time.time_ns() - int(1e9 * (time.monotonic() - record.started_s))
        span = self._tracer.start_span(record.method, parent, SpanKind.SERVER, start_time=at_ns)
        if (context := span.get_span_context()).is_valid:
            record.trace_id = f"{context.trace_id:032x}"
        return RequestTrace(self, span, at_ns)

    def child(self, parent: Context, name: str, start_ns: int, end_ns: int, attributes: Attributes) -> None:
        self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns).end(end_ns)

    async def close(self) -> None:
        """Send what is left, for CLOSE_TIMEOUT_S at most."""
        # A thread of our own: the interpreter waits at its end for those of an executor, and a dead collector may take long.
        closing = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        closing.start()
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while closing.is_alive() and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)


class RequestTrace:
    """One request's span, until it ends."""

    def __init__(self, tracing: Tracing, span: Span, started_ns: int) -> None:
        self._tracing = tracing
        self._span = span
        self._started_ns = started_ns

    def end(self, record: RequestRecord, route: str | None) -> None:
        """route: the path's pattern, None where no route took the request."""
        span = self._span
        if not span.is_recording():
            return
        at_ns = _Clock(self._started_ns, record.started_s)
        span.update_name(f"{record.method} {route}" if route else record.method)
        span.set_attributes(_http_attributes(record, route))
        if record.path in _OPERATIONS:
            span.set_attributes(_operation_attributes(record))
            if record.prompt_tokens is not None:
                span.set_attributes(_usage_attributes(record))
        for event in sorted(_events(record), key=lambda event: event.at_s):
            span.add_event(event.name, timestamp=at_ns(event.at_s))
        if record.error is not None and (record.status >= 500 or record.is_broken):
            span.set_status(Status(StatusCode.ERROR, record.error))
        parent = set_span_in_context(span)
        for index, phases in enumerate(record.phases):
            self._end_phases(parent, phases, {"octavo.prompt.index": index} if record.num_prompts > 1 else {}, at_ns)
        span.end(at_ns(record.started_s + record.total_s))

    def _end_phases(self, parent: Context, phases: Phases, attributes: Attributes, at_ns: _Clock) -> None:
        """The engine says how long each took; the first output's arrival says when that was."""
        first_ns, last_ns = at_ns(phases.first_s), at_ns(phases.last_s)
        prefill_ns = max(at_ns(phases.first_s - phases.prefill_s), self._started_ns)
        queue_ns = max(at_ns(phases.first_s - phases.prefill_s - phases.queue_s), self._started_ns)
        self._tracing.child(parent, "queue", queue_ns, prefill_ns, attributes)
        self._tracing.child(parent, "prefill", prefill_ns, first_ns, attributes)
        if last_ns > first_ns:
            self._tracing.child(parent, "decode", first_ns, last_ns, attributes)


class _Clock:
    """Time of time.monotonic() -> nanoseconds since 1970."""

    def __init__(self, started_ns: int, started_s: float) -> None:
        self._started_ns, self._started_s = started_ns, started_s

    def __call__(self, at_s: float) -> int:
        return self._started_ns + int(1e9 * (at_s - self._started_s))


def _events(record: RequestRecord) -> Iterator[Event]:
    yield from record.events
    if record.ttft_s is not None and record.phases:
        yield Event("first_token", min(phases.first_s for phases in record.phases))
    if "abort" in record.finish_reasons:
        yield Event("client_disconnected", record.started_s + record.total_s)


def _http_attributes(record: RequestRecord, route: str | None) -> Attributes:
    return _without_none(
        {
            "http.request.method": record.method,
            "http.route": route,
            "http.response.status_code": record.status or None,
            "error.type": record.error,
            "octavo.request_id": record.request_id,
            "octavo.api_key_id": record.key_id or None,
        }
    )


def _operation_attributes(record: RequestRecord) -> Attributes:
    found: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": _OPERATIONS[record.path],
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": record.model,
        "gen_ai.request.stream": record.stream,
        "gen_ai.request.id": record.request_id,
    }
    if (sampling := record.sampling) is not None:
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k or None,
            "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
            "gen_ai.request.presence_penalty": sampling.presence_penalty,
            "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
            "gen_ai.request.n": sampling.n,  # vLLM's
        }
    return _without_none(found)


def _usage_attributes(record: RequestRecord) -> Attributes:
    decode_s = max((phases.last_s - phases.first_s for phases in record.phases), default=None)
    in_model_s = None if record.prefill_s is None or decode_s is None else record.prefill_s + decode_s
    return _without_none(
        {
            "gen_ai.response.model": record.model,
            "gen_ai.response.id": record.response_id,
            "gen_ai.response.finish_reasons": record.finish_reasons or None,
            "gen_ai.response.time_to_first_chunk": record.ttft_s if record.stream else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.reasoning.output_tokens": record.reasoning_tokens,
            "octavo.prompts": record.num_prompts,
            "octavo.preemptions": record.preemptions,
            "octavo.replays": record.num_replays,
            # vLLM's
            "gen_ai.usage.prompt_tokens": record.prompt_tokens,
            "gen_ai.usage.completion_tokens": record.output_tokens,
            "gen_ai.latency.e2e": record.total_s,
            "gen_ai.latency.time_in_queue": record.queue_s,
            "gen_ai.latency.time_to_first_token": record.ttft_s,
            "gen_ai.latency.time_in_model_prefill": record.prefill_s,
            "gen_ai.latency.time_in_model_decode": decode_s,
            "gen_ai.latency.time_in_model_inference": in_model_s,
        }
    )


def _without_none(attributes: Mapping[str, AttributeValue | None]) -> Attributes:
    return {name: value for name, value in attributes.items() if value is not None}


def _resource(version: str) -> Resource:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are stronger than what is said here."""
    given = Resource.create()
    ours: Attributes = {"service.version": version, "process.pid": os.getpid()}
    if str(given.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return given.merge(Resource({SERVICE_NAME: "octavo", **ours}))
    return Resource(ours).merge(given)


class _Complaints(logging.Handler):
    """Passes on what the library has to say, a line a minute at most: of a collector that is away it complains all the time."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._next_s = 0.0
        self._num_left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now < self._next_s:
            self._num_left_out += 1
            return
        self._next_s = now + COMPLAINT_INTERVAL_S
        left_out = f" ({self._num_left_out} such lines since the last one)" if self._num_left_out else ""
        self._num_left_out = 0
        logger.warning("OpenTelemetry: %s%s", record.getMessage(), left_out)


def _complain_seldom() -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers = [_Complaints()]
    library.propagate = False
