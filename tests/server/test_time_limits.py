"""Time limits from fields, headers and settings, and how a request ends whose time is up."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from engine.deadlines import FIRST_TOKEN, WHOLE, deadline_exceeded
from engine.errors import RequestFailed
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.test_backlog import ENDPOINTS, metric
from tests.server.test_bad_input import error_of
from tests.server.test_lifetime import Connection, until

GENERATING = {path: body for path, body in ENDPOINTS.items() if path != "/v1/embeddings"}


def seconds_left(api: Api, since: float) -> tuple[float | None, float | None]:
    """The limits that reached the engine, for the first token and for the whole, in seconds after the request was sent."""
    first, whole = api.client.deadlines[-1]
    return (None if first is None else first - since), (None if whole is None else whole - since)


def send(api: Api, path: str, *, headers: dict[str, str] | None = None, **fields: Any) -> float:
    sent = time.monotonic()
    response = api.request("POST", path, json={**ENDPOINTS[path], **fields}, headers=headers)
    assert response.status_code == 200, response.text
    return sent


@pytest.mark.parametrize("path", GENERATING)
def test_none_unless_asked_for(api: Api, path: str) -> None:
    assert seconds_left(api, send(api, path)) == (None, None)


@pytest.mark.parametrize("path", GENERATING)
def test_fields_headers_and_settings(api: Api, path: str) -> None:
    """A field is stronger than a header, and that than the setting."""
    api.config = ServerConfig(model="tiny", request_timeout_s=1000, first_token_timeout_s=100)
    headers = {"X-Request-Timeout": "5000", "x-first-token-timeout": "500.5"}
    for given, limits in (
        ({}, (100, 1000)),
        ({"headers": headers}, (500.5, 5000)),
        ({"headers": headers, "timeout": 6000}, (500.5, 6000)),
        ({"timeout": 6000.25, "first_token_timeout": 600}, (600, 6000.25)),
    ):
        sent = send(api, path, **given)  # type: ignore[arg-type]
        assert seconds_left(api, sent) == (pytest.approx(limits[0], abs=30), pytest.approx(limits[1], abs=30))


def test_an_embedding_has_one_limit(api: Api) -> None:
    api.config = ServerConfig(model="tiny", request_timeout_s=1000, first_token_timeout_s=100)
    for given, limit in (({}, 1000), ({"headers": {"X-Request-Timeout": "5000"}}, 5000), ({"timeout": 60}, 60)):
        sent = send(api, "/v1/embeddings", **given)  # type: ignore[arg-type]
        assert seconds_left(api, sent) == (None, pytest.approx(limit, abs=30))


@pytest.mark.parametrize("name", ["timeout", "first_token_timeout"])
@pytest.mark.parametrize("value", [0, -1, 86401, "5", True, [5]])
def test_fields_out_of_range(api: Api, name: str, value: Any) -> None:
    assert error_of(api.complete(prompt="a", **{name: value}), 400)["param"] == name


@pytest.mark.parametrize("name", ["X-Request-Timeout", "X-First-Token-Timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "86401", "soon", "", "nan", "inf", "1e9"])
def test_headers_out_of_range(api: Api, name: str, value: str) -> None:
    response = api.request("POST", "/v1/completions", json={"prompt": "a"}, headers={name: value})
    error = error_of(response, 400)
    assert error["param"] == name and "at most 86400" in error["message"]


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", [FIRST_TOKEN, WHOLE])
def test_time_that_is_up_before_the_first_token_is_a_504(api: Api, path: str, stream: bool, kind: str) -> None:
    api.client.fail_after, api.client.stream_error = 0, deadline_exceeded(kind, "3.0 s in the engine, 0 tokens")
    response = api.request("POST", path, json={**ENDPOINTS[path], "stream": stream, kind: 3})
    error = error_of(response, 504)
    assert (error["type"], error["code"], error["param"]) == ("timeout_error", "deadline_exceeded", kind)
    assert all(one.aborted for one in api.client.streams)


@pytest.mark.parametrize("path", GENERATING)
def test_time_that_is_up_later_is_an_event(api: Api, path: str) -> None:
    api.client.fail_after, api.client.stream_error = 2, deadline_exceeded(WHOLE, "3.0 s in the engine, 2 tokens")
    response = api.request("POST", path, json={**ENDPOINTS[path], "stream": True, "timeout": 3})
    assert response.status_code == 200 and '"deadline_exceeded"' in response.text
    assert '"finish_reason":"' not in response.text
    whole = api.request("POST", path, json={**ENDPOINTS[path], "timeout": 3})
    assert error_of(whole, 504)["code"] == "deadline_exceeded"


@pytest.mark.parametrize("prompts", ["a", ["a", "b"]])
def test_a_stream_that_is_held_says_what_another_does(api: Api, prompts: Any) -> None:
    plain = api.complete(prompt=prompts, stream=True, max_tokens=5, seed=1)
    held = api.complete(prompt=prompts, stream=True, max_tokens=5, seed=1, timeout=20)
    assert held.status_code == 200
    assert sorted(_texts(plain.text)) == sorted(_texts(held.text)) and len(_texts(held.text)) >= 5


def _texts(stream: str) -> list[tuple[int, str]]:
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return [(choice["index"], choice["text"]) for event in events for choice in event["choices"]]


def test_a_stream_with_much_time_gets_its_status_at_once() -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        body = {"prompt": "a", "stream": True}
        connections = [Connection(client, "/v1/completions", {**body, "timeout": seconds}) for seconds in (20, 3000)]
        assert (await asyncio.wait_for(connections[1].sent.get(), 30))["status"] == 200
        assert connections[0].sent.empty()
        client.gate.set()
        assert (await asyncio.wait_for(connections[0].sent.get(), 30))["status"] == 200
        await asyncio.gather(*(connection.over for connection in connections))

    asyncio.run(scenario())


def test_a_client_that_leaves_while_its_stream_is_held() -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        connection = Connection(client, "/v1/completions", {"prompt": ["a", "b"], "stream": True, "timeout": 20})
        await until(lambda: len(client.streams) == 2)
        connection.gone.set()
        await asyncio.wait_for(connection.over, 30)
        assert connection.sent.get_nowait()["status"] == 499
        assert all(one.aborted for one in client.streams)

    asyncio.run(scenario())


def test_what_was_late_is_counted() -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        async with client.http() as http:
            for kind, num in ((FIRST_TOKEN, 2), (WHOLE, 3)):
                client.fail_after, client.stream_error = 0, deadline_exceeded(kind, "a while")
                for i in range(num):
                    body = {"prompt": "a", "stream": i == 0, "timeout": 5}
                    assert (await http.post("/v1/completions", json=body)).status_code == 504
            client.refusal = deadline_exceeded(WHOLE, "its grammar was still being compiled")
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 504
            assert (await http.post("/v1/embeddings", json={"input": "a"})).status_code == 504
            client.refusal, client.stream_error = None, RequestFailed("not about time")
            assert (await http.post("/v1/completions", json={"prompt": "a"})).status_code == 500
            text = (await http.get("/metrics")).text
        assert metric(text, "octavo_deadlines_exceeded_total", kind=FIRST_TOKEN) == 2
        assert metric(text, "octavo_deadlines_exceeded_total", kind=WHOLE) == 5
        assert metric(text, "octavo_request_success_total", finished_reason="error") == 7
        assert metric(text, "octavo_backlog_tokens") == 0

    asyncio.run(scenario())
