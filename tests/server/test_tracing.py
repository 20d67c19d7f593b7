"""What a collector gets: spans over real HTTP and protobuf, for every way in which a request can go."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError, RequestFailed
from engine.messages import CrashPoint
from server import logs, otlp
from server.config import ServerConfig, load_config
from server.tracing import CLOSE_TIMEOUT_S
from tests.server.fake_client import FakeEngineClient
from tests.server.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.server.served import Answer, ask, served
from tests.test_crash_over_http import serving

SECRET = "tulipbulb"
ERROR = 2
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"

Scenario = Callable[[int], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def log_of_the_library() -> Iterator[None]:
    library = logging.getLogger("opentelemetry")
    before = library.handlers[:], library.propagate
    yield
    library.handlers, library.propagate = before[0], before[1]


def traced(scenario: Scenario, client: FakeEngineClient | None = None, **settings: Any) -> OtlpReceiver:
    """What the collector has after a server has lived through the scenario."""

    async def run(url: str) -> None:
        async with served(client, otlp_endpoint=url, **settings) as (_, port):
            await scenario(port)

    with OtlpReceiver() as receiver:
        asyncio.run(run(receiver.url))
    return receiver


async def post(port: int, path: str, body: dict[str, Any], **headers: str) -> Answer:
    content = json.dumps(body).encode()
    given = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{given}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    return await ask(port, head.encode() + content)


def one_request(path: str, body: dict[str, Any], client: FakeEngineClient | None = None, **headers: str) -> OtlpReceiver:
    async def scenario(port: int) -> None:
        await post(port, path, body, **headers)

    return traced(scenario, client)


def only(receiver: OtlpReceiver) -> ReceivedSpan:
    (span,) = receiver.requests_spans()
    return span


def names(spans: list[ReceivedSpan]) -> list[str]:
    return [span.name for span in spans]


def event_names(span: ReceivedSpan) -> list[str]:
    return [name for name, _ in span.events]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_phases(stream: bool) -> None:
    client = FakeEngineClient()
    client.num_cached_tokens = 2
    before_ns = time.time_ns()
    body = {"prompt": SECRET, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": SECRET, "stream": stream}
    receiver = one_request("/v1/completions", body, client, X_Request_Id="my-id")
    span = only(receiver)
    assert span.name == "POST /v1/completions" and span.parent_id == "" and span.status_code == 0
    assert before_ns <= span.start_ns < span.end_ns <= time.time_ns()
    assert names(receiver.children(span)) == ["queue", "prefill", "decode"]
    found = span.attributes
    assert {name: found.get(name) for name in EXPECTED} == EXPECTED and found["gen_ai.request.stream"] == stream
    assert found["gen_ai.response.id"].startswith("cmpl-")
    assert ("gen_ai.response.time_to_first_chunk" in found) == stream
    assert 0 < found["gen_ai.latency.time_to_first_token"] < found["gen_ai.latency.e2e"] < 60
    assert event_names(span) == ["first_token"]
    assert receiver.requests[0][0] == "/v1/traces"
    assert span.resource["service.name"] == "octavo" and span.resource["service.version"]
    assert not any(SECRET.encode() in body for body in receiver.bodies)


EXPECTED = {
    "http.request.method": "POST",
    "http.route": "/v1/completions",
    "http.response.status_code": 200,
    "octavo.request_id": "my-id",
    "gen_ai.operation.name": "text_completion",
    "gen_ai.provider.name": "octavo",
    "gen_ai.request.model": "tiny",
    "gen_ai.response.model": "tiny",
    "gen_ai.request.max_tokens": 5,
    "gen_ai.request.temperature": 0.5,
    "gen_ai.request.top_p": 0.9,
    "gen_ai.request.top_k": 7,
    "gen_ai.response.finish_reasons": ["length"],
    "gen_ai.usage.input_tokens": len(SECRET),
    "gen_ai.usage.output_tokens": 5,
    "gen_ai.usage.cache_read.input_tokens": 2,
    "gen_ai.usage.prompt_tokens": len(SECRET),
    "gen_ai.usage.completion_tokens": 5,
    "gen_ai.latency.time_in_queue": 0.25,
    "gen_ai.latency.time_in_model_prefill": 0.5,
    "octavo.preemptions": 0,
    "octavo.replays": 0,
    "error.type": None,
    "octavo.api_key_id": None,
}


def test_phases_follow_each_other_within_the_request() -> None:
    receiver = one_request("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    span = only(receiver)
    queue, prefill, decode = receiver.children(span)
    assert span.start_ns <= queue.start_ns <= queue.end_ns == prefill.start_ns <= prefill.end_ns == decode.start_ns
    assert decode.start_ns < decode.end_ns <= span.end_ns
    assert span.attributes["gen_ai.operation.name"] == "chat" and span.attributes["gen_ai.response.id"].startswith("chatcmpl-")
    assert {child.trace_id for child in receiver.spans} == {span.trace_id}


def test_several_choices_and_prompts() -> None:
    async def scenario(port: int) -> None:
        await post(port, "/v1/completions", {"prompt": "a", "n": 3, "max_tokens": 4})
        await post(port, "/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4})
        await post(port, "/v1/completions", {"prompt": ["a"] * 40, "max_tokens": 2})

    receiver = traced(scenario)
    choices, prompts, many = receiver.requests_spans()
    assert names(receiver.children(choices)) == ["queue", "prefill", "decode"]
    assert choices.attributes["gen_ai.request.choice.count"] == 3
    assert choices.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    assert choices.attributes["gen_ai.usage.output_tokens"] == 12
    assert sorted(names(receiver.children(prompts))) == ["decode", "decode", "prefill", "prefill", "queue", "queue"]
    assert {child.attributes["octavo.prompt.index"] for child in receiver.children(prompts)} == {0, 1}
    assert many.attributes["octavo.prompts"] == 40 and len(receiver.children(many)) == 3 * 16


def test_embeddings() -> None:
    receiver = one_request("/v1/embeddings", {"input": ["a", "bc"]})
    span = only(receiver)
    assert span.attributes["gen_ai.operation.name"] == "embeddings" and span.attributes["gen_ai.usage.input_tokens"] == 3
    assert sorted(names(receiver.children(span))) == ["prefill", "prefill", "queue", "queue"]


def test_a_refused_request() -> None:
    span = only(one_request("/v1/completions", {"prompt": "a", "model": SECRET}))
    assert span.attributes["error.type"] == "model_not_found" and span.attributes["http.response.status_code"] == 404
    assert span.status_code == 0, "what the client did wrong is no error of the server"
    assert "gen_ai.request.model" not in span.attributes and "gen_ai.usage.output_tokens" not in span.attributes


def test_no_route_and_no_key() -> None:
    async def scenario(port: int) -> None:
        await post(port, f"/{SECRET}", {}, Authorization="Bearer k")
        await post(port, "/v1/completions", {"prompt": "a"}, Authorization=f"Bearer {SECRET}")
        await post(port, "/v1/completions", {"prompt": "a"}, Authorization="Bearer k")

    receiver = traced(scenario, api_key=["k me"])
    nowhere, stranger, known = receiver.requests_spans()
    assert nowhere.name == "POST" and "http.route" not in nowhere.attributes
    assert stranger.attributes["octavo.api_key_id"] == "invalid" and stranger.attributes["error.type"] == "invalid_api_key"
    assert known.attributes["octavo.api_key_id"] == "me"
    assert not any(SECRET.encode() in body for body in receiver.bodies)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails(stream: bool) -> None:
    client = FakeEngineClient()
    client.fail_after, client.stream_error = 2, RequestFailed(f"no {SECRET}", code="bad_numbers")
    span = only(receiver := one_request("/v1/completions", {"prompt": "a", "stream": stream}, client))
    assert (span.status_code, span.status_message) == (ERROR, "bad_numbers")
    assert span.attributes["error.type"] == "bad_numbers"
    assert span.attributes["http.response.status_code"] == (200 if stream else 500)
    assert span.attributes["gen_ai.response.finish_reasons"] == ["error"]
    assert span.attributes["gen_ai.usage.output_tokens"] == 2
    assert names(receiver.children(span)) == ["queue", "prefill", "decode"]
    assert not any(SECRET.encode() in body for body in receiver.bodies)


def test_a_bug_is_an_error_without_its_message() -> None:
    client = FakeEngineClient()
    client.refusal = ValueError(SECRET)  # type: ignore[assignment]
    span = only(receiver := one_request("/v1/completions", {"prompt": "a"}, client))
    assert (span.status_code, span.status_message) == (ERROR, "internal_error")
    assert span.attributes["http.response.status_code"] == 500
    assert not any(SECRET.encode() in body for body in receiver.bodies)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(stream: bool) -> None:
    client = FakeEngineClient()

    async def scenario(port: int) -> None:
        client.gate.clear()
        content = json.dumps({"prompt": "a", "stream": stream}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        while not client.streams:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        writer.close()
        while not client.streams[0].aborted:
            await asyncio.sleep(0.005)

    span = only(receiver := traced(scenario, client))
    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"] and span.status_code == 0
    assert "client_disconnected" in event_names(span)
    assert receiver.children(span) == [], "it had no token yet, so nothing is known of its phases"


def test_a_clients_trace_goes_on() -> None:
    span = only(receiver := one_request("/v1/completions", {"prompt": "a"}, traceparent=TRACEPARENT))
    assert span.trace_id == TRACE_ID and span.parent_id == PARENT_ID
    assert {child.trace_id for child in receiver.spans} == {TRACE_ID}


def trace_of_the_line(traceparent: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What the line of a request with this header says of its trace."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.set_up_logging("info", log_format="json")
        one_request("/v1/completions", {"prompt": "a"}, traceparent=traceparent)
    finally:
        root.handlers[:], root.level = before[0], before[1]
    (line,) = [entry for entry in map(json.loads, capsys.readouterr().err.splitlines()) if entry["message"] == "request"]
    found: str | None = line.get("trace_id")
    return found


def test_log_lines_name_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_of_the_line(TRACEPARENT, capsys) == TRACE_ID


def test_log_lines_name_a_trace_that_is_not_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever began it has it in lines of its own."""
    assert trace_of_the_line(TRACEPARENT[:-2] + "00", capsys) == TRACE_ID


@pytest.mark.parametrize("given", ["", "00-xyz-1-01", f"00-{'0' * 32}-{PARENT_ID}-01", "a\xff"])
def test_what_is_no_trace_begins_one(given: str) -> None:
    span = only(one_request("/v1/completions", {"prompt": "a"}, traceparent=given))
    assert span.parent_id == "" and span.trace_id not in ("0" * 32, TRACE_ID)


def test_a_trace_that_its_client_does_not_sample() -> None:
    receiver = one_request("/v1/completions", {"prompt": "a"}, traceparent=TRACEPARENT[:-2] + "00")
    assert receiver.spans == []


def test_probes_and_scrapes_are_not_traced() -> None:
    async def scenario(port: int) -> None:
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/v1/models"):
            await ask(port, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())

    assert names(traced(scenario).spans) == ["GET /v1/models"]


def test_the_standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "books")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=shelf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x,tenant=me")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    receiver = one_request("/v1/completions", {"prompt": "a"})
    assert only(receiver).resource["service.name"] == "books"
    assert only(receiver).resource["deployment.environment.name"] == "shelf"
    headers = receiver.requests[0][1]
    assert (headers["authorization"], headers["tenant"], headers["content-encoding"]) == ("Bearer x", "me", "gzip")


@pytest.mark.parametrize(("name", "value"), [("BSP_MAX_QUEUE_SIZE", "-1"), ("BSP_MAX_EXPORT_BATCH_SIZE", "9999")])
def test_a_wrong_standard_variable_is_a_sentence(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"OTEL_{name}", value)
    with pytest.raises(ConfigError, match="OpenTelemetry refuses one of its OTEL_ variables: max"):
        one_request("/v1/completions", {"prompt": "a"})


@pytest.mark.parametrize(("sampler", "num_spans"), [("always_off", 0), ("traceidratio", 0), ("parentbased_always_on", 4)])
def test_sampling(sampler: str, num_spans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    assert len(one_request("/v1/completions", {"prompt": "a"}).spans) == num_spans


def test_without_opentelemetry_the_pip_that_helps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip of another environment finds no octavo."""
    monkeypatch.setattr(otlp, "_NEEDED", ("opentelemetry.nothing_of_this_name",))
    with pytest.raises(ConfigError, match=rf"not installed: {re.escape(sys.executable)} -m pip install 'octavo\[tracing\]'"):
        otlp.check_tracing("http://localhost:4318")


def test_a_collector_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    """A line in the log, answers as ever, and an end that does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]

    async def scenario() -> float:
        async with served(otlp_endpoint=f"http://127.0.0.1:{port}") as (server, at):
            for _ in range(3):
                assert (await post(at, "/v1/completions", {"prompt": "a"})).status == 200
            begun_s = time.monotonic()
            server.should_exit = True
        return time.monotonic() - begun_s

    with caplog.at_level("INFO"):
        assert asyncio.run(scenario()) < CLOSE_TIMEOUT_S + 30
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1 and lines[0].startswith("OpenTelemetry: Transient error")


def test_a_collector_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"

        async def scenario() -> None:
            async with served(otlp_endpoint=url) as (_, port):
                assert (await post(port, "/v1/completions", {"prompt": "a"})).status == 200

        asyncio.run(asyncio.wait_for(scenario(), CLOSE_TIMEOUT_S + 60))


@pytest.mark.timeout(240)
def test_a_request_that_outlives_its_engine(tmp_path: Path) -> None:
    with OtlpReceiver() as receiver:
        point = CrashPoint(place="before_step", kind="kill", step=20)
        with serving(tmp_path, point, "--otlp-endpoint", receiver.url, step_s=0.01) as server:
            body = {"prompt": [3, 4, 5], "max_tokens": 60, "ignore_eos": True}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code == 200
            server.process.terminate()
            assert server.process.wait(60) == 0
    span = only(receiver)
    assert event_names(span) == ["first_token", "engine_died", "replay"]
    assert span.attributes["octavo.replays"] == 1 and span.status_code == 0
    _, prefill, decode = receiver.children(span)
    times = dict(span.events)
    assert prefill.end_ns == times["first_token"] < times["engine_died"] < times["replay"] < decode.end_ns


@pytest.mark.timeout(240)
def test_preempted_requests(tmp_path: Path) -> None:
    """Twelve answers of 300 tokens want 3,700 tokens of pages; there are 1,600."""
    with OtlpReceiver() as receiver, serving(tmp_path, None, "--otlp-endpoint", receiver.url) as server:
        body = {"prompt": [[3, 4, 5 + i] for i in range(12)], "max_tokens": 300, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code == 200
        server.process.terminate()
        assert server.process.wait(60) == 0
    span = only(receiver)
    assert span.attributes["octavo.preemptions"] > 0
    assert 0 < event_names(span).count("preemption") <= span.attributes["octavo.preemptions"]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("http://localhost:4318/", "http://localhost:4318/v1/traces"),
        ("https://host/otlp/v1/traces", "https://host/otlp/v1/traces"),
    ],
)
def test_where_traces_go(given: str, url: str) -> None:
    assert otlp.traces_url(given) == url


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("localhost:4318", "must be the URL of a collector, like http://localhost:4318, got 'localhost:4318'"),
        ("http://", "must be the URL"),
        ("http://host:port", "must be the URL"),
        ("http://me:secret@host", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://host:4317", "port 4317 is a collector's port for gRPC"),
    ],
)
def test_what_is_no_collector(given: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["--otlp-endpoint", given], {})
    assert sentence in caught.value.message and "--otlp-endpoint in the command line" in caught.value.message
    assert "secret" not in caught.value.message


def test_without_the_extra_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[tracing\]'"):
        load_config([], {"OCTAVO_OTLP_ENDPOINT": "http://localhost:4318"})
    assert load_config([], {}).otlp_endpoint is None


def test_nothing_is_imported_without_the_setting() -> None:
    program = (
        "import sys, server.app, server.serve, server.config\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'google.'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_layer_traces_without_the_setting() -> None:
    async def scenario() -> None:
        async with served() as (_, port):
            answer = await post(port, "/v1/completions", {"prompt": "a"}, traceparent=TRACEPARENT)
            assert answer.status == 200 and "x-request-id" in answer.headers

    asyncio.run(scenario())
    assert ServerConfig(model="tiny").otlp_endpoint is None
