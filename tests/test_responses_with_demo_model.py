"""/v1/responses of the demo model, by OpenAI's SDK: turns that build on each other, answers held to a schema, forced calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.test_server_with_demo_model import Server, start_server

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "strict": True,
}


class City(BaseModel):
    name: Literal["Paris", "London", "Rome"]
    is_capital: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("server") / "log", "--dtype", "float32", "--max-model-len", "2048")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_turns_build_on_each_other(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input="What is the capital of France?", temperature=0)
    assert first.output_text == "The capital of France is Paris."
    asked = {"model": "demo", "input": "How many people live there?", "temperature": 0, "max_output_tokens": 24}
    second = client.responses.create(previous_response_id=first.id, **asked)  # type: ignore[call-overload]
    messages: Any = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "How many people live there?"},
    ]
    chat = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=24)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None and chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "Name three colours.", "temperature": 0, "max_output_tokens": 32}
    whole = client.responses.create(**asked)
    with client.responses.create(**asked, stream=True) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text and len(text) > 10
    assert events[-1].type == f"response.{whole.status}"


def test_an_answer_held_to_a_schema(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="demo", input="Tell me about a city, as JSON.", text_format=City, max_output_tokens=100, temperature=0
    )
    assert response.output_parsed is not None and response.output_parsed.name in ("Paris", "London", "Rome")


def test_a_forced_call_and_its_answer(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    first = client.responses.create(
        model="demo", input=question, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, temperature=0
    )
    (call,) = first.output
    assert call.type == "function_call" and call.name == "get_weather" and first.status == "completed"
    arguments = json.loads(call.arguments)
    assert arguments.keys() == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees and rain"}
    second = client.responses.create(
        model="demo", previous_response_id=first.id, input=[output], tools=[WEATHER], tool_choice="none", max_output_tokens=32
    )
    assert second.output_text
