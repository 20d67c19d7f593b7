"""Work for a client that may go away, in a handler that may be cancelled at any moment: what it had begun is let go of."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest
from starlette.types import Message

from engine.client import EngineClient
from server.app import create_app
from server.config import ServerConfig
from server.disconnect import unless_disconnected
from server.errors import ClientDisconnected
from tests.server.fake_client import FakeEngineClient


async def stays() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def goes() -> Message:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("num_turns", range(1, 9))
def test_a_result_comes_to_the_caller_or_is_released(num_turns: int) -> None:
    """Cancelled after any number of the loop's turns: before it began, in the middle, in the moment it was done, after it."""
    released: list[str] = []
    begun: list[str] = []

    async def work() -> str:
        await asyncio.sleep(0)
        begun.append("result")
        return "result"

    async def scenario() -> None:
        handler = asyncio.create_task(unless_disconnected(stays, work(), release=released.append))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        handler.cancel()
        (outcome,) = await asyncio.gather(handler, return_exceptions=True)
        got = [outcome] if isinstance(outcome, str) else []
        assert got + released == begun

    asyncio.run(scenario())


def test_what_fails_or_is_given_up_is_not_released() -> None:
    async def fail() -> str:
        raise ValueError

    async def wait() -> str:
        await asyncio.Event().wait()
        return "never"

    async def scenario() -> None:
        released: list[str] = []
        with pytest.raises(ValueError):
            await unless_disconnected(stays, fail(), release=released.append)
        with pytest.raises(ClientDisconnected):
            await unless_disconnected(goes, wait(), release=released.append)
        assert released == []

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_handler_leaves_nothing_running(path: str, stream: bool) -> None:
    """Cancelled from outside after every possible number of turns."""
    field: dict[str, Any] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"input": "a"},
    }[path]

    async def scenario() -> None:
        client = FakeEngineClient()
        app = create_app(cast(EngineClient, client), ServerConfig(model="tiny"))
        await _ask(app, path, field | {"stream": stream})  # what is done once
        was_cancelled = True
        num_turns = 0
        while was_cancelled:
            client.streams.clear()
            handler = asyncio.create_task(_ask(app, path, field | {"stream": stream}))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            was_cancelled = handler.cancel()
            await asyncio.gather(handler, return_exceptions=True)
            for _ in range(5):
                await asyncio.sleep(0)
            assert all(running.aborted for running in client.streams), f"cancelled after {num_turns} turns"
            num_turns += 1
        assert num_turns > 10

    asyncio.run(scenario())


async def _ask(app: Any, path: str, body: dict[str, Any]) -> None:
    messages: list[Message] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await stays()

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers,
        "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("x", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
