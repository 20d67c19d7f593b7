"""Short ways to talk to an application around a FakeEngineClient."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient


class Api:
    """Sends requests one by one, each in an event loop of its own."""

    def __init__(self) -> None:
        self.client = FakeEngineClient()
        self.config = ServerConfig(model="tiny")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client.http(self.config) as http:
                return await http.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def complete(self, **body: Any) -> httpx.Response:
        return self.request("POST", "/v1/completions", json=body)

    def chat(self, content: Any = "hi", **body: Any) -> httpx.Response:
        return self.request("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **body})


def events(response: httpx.Response) -> list[Any]:
    """The JSON of every event; the last one must be [DONE]."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


@pytest.fixture
def api() -> Api:
    return Api()
