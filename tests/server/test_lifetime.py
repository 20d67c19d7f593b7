"""What a request holds in the engine is let go of, however the request ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from engine.client import EngineClient
from engine.errors import InvalidRequest, RequestFailed
from server.app import create_app
from server.config import ServerConfig
from tests.server.conftest import Api, events
from tests.server.fake_client import FakeEngineClient


class Connection:
    """One request over bare ASGI, by a client that can go away."""

    def __init__(self, client: FakeEngineClient, path: str, body: dict[str, Any]) -> None:
        self._app = create_app(cast(EngineClient, client), ServerConfig(model="tiny"))
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path, "raw_path": b"",
            "root_path": "", "scheme": "http", "query_string": b"", "headers": [], "client": ("x", 1), "server": ("y", 2),
        }  # fmt: skip
        self._messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.gone = asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.over = asyncio.create_task(self._app(self._scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._messages:
            return self._messages.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.put_nowait(message)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


BODIES = {"/v1/completions": {"prompt": ["a", "b"]}, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_what_it_held(path: str, stream: bool) -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        connection = Connection(client, path, {**BODIES[path], "stream": stream})
        await until(lambda: len(client.streams) == (2 if path == "/v1/completions" else 1))
        if stream:
            assert (await connection.sent.get())["status"] == 200
        connection.gone.set()
        await asyncio.wait_for(connection.over, 10)
        assert all(one.aborted for one in client.streams)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_goes_away_before_it_was_accepted(path: str) -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        client.accepting.clear()
        connection = Connection(client, path, {**BODIES[path], "stream": True})
        await asyncio.sleep(0)
        connection.gone.set()
        await asyncio.wait_for(connection.over, 10)
        assert connection.sent.get_nowait()["status"] == 499
        client.accepting.set()
        await asyncio.sleep(0)
        assert not client.streams

    asyncio.run(scenario())


def test_a_client_that_goes_away_in_the_middle(api: Api) -> None:
    async def scenario() -> None:
        client = FakeEngineClient("x" * 40)
        connection = Connection(client, "/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 40})
        while b'"x"' not in (await connection.sent.get()).get("body", b""):
            pass
        client.gate.clear()
        connection.gone.set()
        await asyncio.wait_for(connection.over, 10)
        assert client.streams[0].aborted

    asyncio.run(scenario())


@pytest.mark.parametrize("path", BODIES)
def test_an_error_in_the_middle(api: Api, path: str) -> None:
    api.client.fail_after, api.client.stream_error = 2, RequestFailed("the engine gave up")
    *chunks, last = events(api.request("POST", path, json={**BODIES[path], "stream": True}))
    assert any(chunk["choices"] for chunk in chunks)
    assert last["error"]["message"] == "the engine gave up" and last["error"]["code"] == "request_failed"
    response = api.request("POST", path, json=BODIES[path])
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert all(stream.aborted for stream in api.client.streams)


def test_a_bug_in_the_middle_of_a_stream_tells_no_details(api: Api) -> None:
    api.client.fail_after, api.client.stream_error = 1, RuntimeError("tulip")
    response = api.complete(prompt="a", stream=True)
    assert events(response)[-1]["error"]["code"] == "internal_error" and "tulip" not in response.text


def test_one_refused_prompt_leaves_none_running(api: Api) -> None:
    api.client.refusal, api.client.refuse_after = InvalidRequest("does not fit"), 2
    response = api.complete(prompt=["a", "b", "c"], stream=True)
    assert response.status_code == 400
    assert len(api.client.streams) == 2 and all(stream.aborted for stream in api.client.streams)
