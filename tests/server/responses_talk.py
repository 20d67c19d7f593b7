"""Talks with /v1/responses over one application, by OpenAI's SDK: what one request stores, a later one finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx
import msgspec
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient, byte_tokenizer

CONTEXT = 4096
# Writes out all that it is given; knows tools, in Hermes' form.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' or m.tool_calls %}{% endif %}{{ m | tojson }}\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}\n{% endif %}"
    "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% if enable_thinking is defined %}thinks {{ enable_thinking }}\n{% endif %}"
    "{% if prefix is defined %}{{ prefix }}{% endif %}"
)
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
T = TypeVar("T")

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class Talk:
    """say: the script of the next answers. prompts: of all requests, as lines of JSON messages and what else there is."""

    def __init__(self, http: httpx.AsyncClient, client: FakeEngineClient) -> None:
        self.http = http
        self.client = client
        self.sdk = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)

    def say(self, script: str) -> None:
        self.client.script = self.client.tokenizer.encode(script)

    def prompt(self) -> str:
        return self.client.tokenizer.decode(self.client.prompts[-1])

    def messages(self) -> list[dict[str, Any]]:
        """The messages of the last prompt."""
        return [json.loads(line) for line in self.prompt().split("\n") if line.startswith("{")]

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/responses", json={"input": "hi", **body})

    async def create(self, **body: Any) -> dict[str, Any]:
        """An answer, which must be a Response of OpenAI's."""
        answer = await self.post(**body)
        assert answer.status_code == 200, answer.text
        Response.model_validate(answer.json())
        return dict(answer.json())

    async def refused(self, status: int = 400, **body: Any) -> tuple[str | None, str | None]:
        """(param, code) of the error."""
        answer = await self.post(**body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        return error["param"], error["code"]

    async def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The events, each of which must be one of OpenAI's."""
        answer = await self.post(stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events_of(answer.text)


def events_of(text: str) -> list[dict[str, Any]]:
    """Checks framing, numbers and types."""
    events = []
    for index, block in enumerate(text.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == index
        EVENT.validate_python(event)
        if "response" in event:
            Response.model_validate(event["response"])
        events.append(event)
    return events


def talk(steps: Callable[[Talk], Awaitable[T]], *, script: str = "Hello world", template: str = TEMPLATE, **settings: Any) -> T:
    """Runs `steps` on an application of its own."""

    async def run() -> T:
        client = FakeEngineClient(script)
        client.tokenizer = byte_tokenizer(template)
        assert client.ready is not None
        client.ready = msgspec.structs.replace(client.ready, max_model_len=CONTEXT)
        async with client.http(ServerConfig(model="tiny", **settings)) as http:
            return await steps(Talk(http, client))

    return asyncio.run(run())
