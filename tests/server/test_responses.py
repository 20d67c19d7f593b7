"""/v1/responses: input of every kind, every field, and the answer as OpenAI's SDK reads it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from engine.errors import RequestFailed
from tests.server.responses_talk import CONTEXT, WEATHER, Talk, talk

LOGPROBS = ["message.output_text.logprobs"]


def test_a_plain_answer() -> None:
    async def steps(t: Talk) -> None:
        response = await t.sdk.responses.create(model="tiny", input="hi")
        assert response.output_text == "Hello world" and response.status == "completed" and response.id.startswith("resp_")
        assert response.error is None and response.incomplete_details is None and response.completed_at is not None
        assert t.messages() == [{"role": "user", "content": "hi"}]
        assert response.usage is not None
        num_tokens = len(t.client.prompts[0])
        assert (response.usage.input_tokens, response.usage.output_tokens) == (num_tokens, 11)
        assert response.usage.total_tokens == num_tokens + 11

    talk(steps)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        (
            [
                {"type": "message", "role": role, "content": [{"type": "input_text", "text": "x"}]}
                for role in ("system", "user")
            ],
            [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}],
        ),
        # The template has no place for the developer, so that is the system.
        ([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}], [("system", "d"), ("user", "u")]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [("user", "a\nb")],
        ),
        (
            [
                {"role": "user", "content": "u"},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "phase": "final_answer",
                    "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}],
                },
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "user", "content": "v"},
            ],
            [("user", "u"), ("assistant", "a"), ("assistant", "no"), ("user", "v")],
        ),
    ],
)
def test_messages(given: Any, messages: list[Any]) -> None:
    async def steps(t: Talk) -> None:
        await t.create(input=given)
        wanted = [{"role": item[0], "content": item[1]} if isinstance(item, tuple) else item for item in messages]
        assert t.messages() == wanted

    talk(steps)


def test_items_of_a_turn_become_one_message() -> None:
    async def steps(t: Talk) -> None:
        await t.create(
            input=[
                {"role": "user", "content": "u"},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hmm"}]},
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
                {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}", "id": None},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
                {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "unreadable"},
                {"type": "message", "role": "assistant", "content": "Rain at noon."},
                {"role": "user", "content": "v"},
            ]
        )
        user, assistant, first, second, answer, last = t.messages()
        assert (assistant["reasoning_content"], assistant["content"]) == ("hmm", "Let me see.")
        assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["weather", "time"]
        assert first == {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
        assert second == {"role": "tool", "tool_call_id": "c2", "name": "time", "content": "noon"}
        assert answer == {"role": "assistant", "content": "Rain at noon."}
        assert (user["content"], last["content"]) == ("u", "v")

    talk(steps)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        (3, "input"),
        ([3], "input[0]"),
        ([{}], "input[0].role"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": 3}], "input[0].content"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 3}]}], "input[0].content[0].text"),
        ([{"type": "web_search_call", "id": "x"}], "input[0].type"),
        ([{"type": ["message"], "role": "user", "content": "x"}], "input[0].type"),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
        ([{"type": "function_call", "name": "f", "arguments": {}, "call_id": "c"}], "input[0].arguments"),
        ([{"type": "function_call_output", "call_id": "c", "output": "no call before it"}], "input"),
        ([{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "no output"}], "input"),
        ([{"type": "item_reference", "id": "msg_none"}], "input[0].id"),
        ([{"id": "msg_none"}], "input[0].id"),
        ([{"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "text", "text": ""}]}], "input[0].content[0]"),
    ],
)
def test_input_that_is_refused(given: Any, param: str) -> None:
    async def steps(t: Talk) -> None:
        body = {} if given is None else {"input": given}
        answer = await t.http.post("/v1/responses", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        assert "unreadable" not in answer.text and "no call before" not in answer.text

    talk(steps)


def test_what_the_template_refuses_is_the_input() -> None:
    async def steps(t: Talk) -> None:
        assert (await t.refused())[0] == "input"
        assert (await t.refused(truncation="auto", input=[{"role": "user", "content": text} for text in "ab"]))[0] == "input"
        answer = await t.http.post("/v1/responses/input_tokens", json={"input": "hi"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"

    talk(steps, template="{{ raise_exception('No.') }}")


def test_unknown_fields_of_items_are_listed() -> None:
    async def steps(t: Talk) -> None:
        answer = await t.post(input=[{"role": "user", "content": "u", "mood": 1}], text={"verbosity": "low"})
        listed = answer.headers["X-Octavo-Ignored-Fields"].split(", ")
        assert sorted(listed) == ["input[0].mood", "text.verbosity"]

    talk(steps)

    async def strict(t: Talk) -> None:
        assert await t.refused(input=[{"role": "user", "content": "u", "mood": 1}]) == ("input[0].mood", "unknown_field")
        choice = {"type": "function", "name": "f", "mood": 1}
        tools = [{"type": "function", "name": "f"}]
        assert await t.refused(tools=tools, tool_choice=choice) == ("tool_choice.mood", "unknown_field")

    talk(strict, strict=True)


def test_instructions_come_first() -> None:
    async def steps(t: Talk) -> None:
        response = await t.create(instructions="Be kind.", input=[{"role": "user", "content": "u"}])
        assert t.messages() == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "u"}]
        assert response["instructions"] == "Be kind."

    talk(steps)


def test_max_output_tokens() -> None:
    async def steps(t: Talk) -> None:
        response = await t.create(max_output_tokens=4)
        assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete" and response["output"][0]["content"][0]["text"] == "Hell"
        assert response["max_output_tokens"] == 4 and response["completed_at"] is None
        assert await t.refused(max_output_tokens=0) == ("max_output_tokens", "invalid_value")
        assert await t.refused(max_output_tokens=CONTEXT) == ("max_output_tokens", "context_length_exceeded")
        await t.create()
        assert t.client.sampling[-1].max_tokens == CONTEXT - len(t.client.prompts[-1])

    talk(steps)


def test_logprobs() -> None:
    async def steps(t: Talk) -> None:
        response = await t.create(include=LOGPROBS, top_logprobs=2, max_output_tokens=2)
        logprobs = response["output"][0]["content"][0]["logprobs"]
        assert [(entry["token"], entry["bytes"], len(entry["top_logprobs"])) for entry in logprobs] == [
            ("H", [72], 2),
            ("e", [101], 2),
        ]
        assert response["top_logprobs"] == 2
        assert (await t.create(include=LOGPROBS))["output"][0]["content"][0]["logprobs"][0]["top_logprobs"] == []
        assert (await t.create())["output"][0]["content"][0]["logprobs"] == []
        assert t.client.sampling[-1].logprobs is None
        assert await t.refused(top_logprobs=2) == ("top_logprobs", "invalid_value")
        assert await t.refused(top_logprobs=21, include=LOGPROBS) == ("top_logprobs", "invalid_value")

    talk(steps)


def test_reasoning() -> None:
    async def steps(t: Talk) -> None:
        response = await t.sdk.responses.create(model="tiny", input="hi", reasoning={"effort": "high"})
        assert "effort high\n" in t.prompt()
        thoughts, message = response.output
        assert thoughts.type == "reasoning" and thoughts.content is not None and thoughts.content[0].text == "so"
        assert thoughts.summary == [] and message.type == "message" and response.output_text == "Yes"
        assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens == len("<think>so</think>")
        answer = await t.post(reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"])
        assert answer.headers["X-Octavo-Ignored-Fields"] == "reasoning.summary, include[0]"
        assert (await t.refused(reasoning={"effort": "enormous"}))[0] == "reasoning.effort"
        await t.create(reasoning={"effort": "none"}, chat_template_kwargs={"prefix": "P!"})
        assert "thinks False\n" in t.prompt()
        assert t.prompt().endswith("P!")

    talk(steps, script="<think>so</think>Yes", reasoning_parser="think")


def test_usage_and_explain() -> None:
    async def steps(t: Talk) -> None:
        t.client.num_cached_tokens, t.client.num_preemptions = 16, 2
        usage = (await t.create())["usage"]
        assert usage["input_tokens_details"] == {"cached_tokens": 16, "cache_write_tokens": 0} and "octavo" not in usage
        octavo = (await t.create(explain=True, seed=5))["usage"]["octavo"]
        assert octavo["seed"] == 5 and octavo["cached_tokens"] == 16 and octavo["preemptions"] == 2
        assert octavo.keys() == {"queue_s", "prefill_s", "ttft_s", "total_s", "cached_tokens", "preemptions", "seed"}
        events = await t.stream(explain=True, seed=5)
        assert events[-1]["response"]["usage"]["octavo"]["seed"] == 5

    talk(steps)


class Person(BaseModel):
    name: str
    age: int


def test_structured_text_parsed_by_the_sdk() -> None:
    async def steps(t: Talk) -> None:
        response = await t.sdk.responses.parse(model="tiny", input="hi", text_format=Person)
        assert response.output_parsed == Person(name="Ada", age=36)
        structured = t.client.sampling[-1].structured
        assert structured is not None and '"age"' in structured.text
        async with t.sdk.responses.stream(model="tiny", input="hi", text_format=Person) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == Person(name="Ada", age=36)
        schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
        text = {"format": {"type": "json_schema", "name": "x", "strict": True, "schema": schema}}
        response = await t.create(text=text)
        assert response["text"] == text

    talk(steps, script='{"name": "Ada", "age": 36}')


def test_other_structured_text() -> None:
    async def steps(t: Talk) -> None:
        await t.create(text={"format": {"type": "text"}})
        assert t.client.sampling[-1].structured is None
        await t.create(text={"format": {"type": "json_object"}})
        structured = t.client.sampling[-1].structured
        assert structured is not None and structured.kind == "json_schema"
        await t.create(structured_outputs={"regex": "[a-z]+"})
        structured = t.client.sampling[-1].structured
        assert structured is not None and structured.kind == "regex"
        both = {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}
        assert (await t.refused(**both))[0] == "text.format"
        assert (await t.refused(text={"format": {"type": "xml"}}))[0] == "text.format.type"
        assert (await t.refused(text={"format": {"type": "json_schema", "name": "x"}}))[0] == "text.format.schema"
        assert (await t.refused(text={"format": {"type": "json_schema", "schema": {}}}))[0] == "text.format.name"
        wrong = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object", "uniqueItems": 3}}}
        assert str((await t.refused(text=wrong))[0]).startswith("text.format.schema")

    talk(steps)


def test_truncation() -> None:
    long = "x" * (CONTEXT // 3)
    given = [
        {"role": "system", "content": "stay"},
        *({"role": role, "content": f"{turn}{long}"} for turn in range(4) for role in ("user", "assistant")),
        {"role": "user", "content": "last"},
    ]

    async def steps(t: Talk) -> None:
        assert await t.refused(input=given) == ("input", "context_length_exceeded")
        response = await t.create(input=given, truncation="auto", instructions="i")
        assert response["truncation"] == "auto"
        assert [message["content"][0] for message in t.messages()] == ["i", "s", "3", "3", "l"]
        # What is stored is all of it: a model with a longer context could go on from there.
        items = await t.sdk.responses.input_items.list(response["id"], limit=100)
        assert len(items.data) == len(given)
        await t.create(input=given, truncation="auto", max_output_tokens=CONTEXT // 2)
        assert [message["content"][0] for message in t.messages()] == ["s", "l"]
        only = [{"role": "user", "content": "x" * CONTEXT}]
        assert (await t.refused(input=only, truncation="auto"))[1] == "context_length_exceeded"
        await t.create(input=[{"role": "system", "content": "alone"}], truncation="auto")
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": "late"}
        await t.create(input=[given[1], call, given[1], output, *given[1:]], truncation="auto")
        assert [message["content"][0] for message in t.messages()] == ["3", "3", "l"]

    talk(steps)


def test_models_and_the_engine() -> None:
    async def steps(t: Talk) -> None:
        assert await t.refused(404, model="other") == ("model", "model_not_found")
        t.client.fail_after, t.client.stream_error = 3, RequestFailed("It broke.")
        assert await t.refused(500) == (None, "request_failed")
        t.client.refusal = RequestFailed("No room.")
        assert await t.refused(500, stream=True) == (None, "request_failed")
        t.client.state = "starting"
        assert await t.refused(503) == (None, "engine_unavailable")

    talk(steps)


def test_counting_input_tokens() -> None:
    async def steps(t: Talk) -> None:
        counted = await t.sdk.responses.input_tokens.count(model="tiny", input="hi", instructions="Be kind.", tools=[WEATHER])  # type: ignore[list-item]
        assert not t.client.prompts
        response = await t.create(instructions="Be kind.", tools=[WEATHER])
        assert counted.input_tokens == response["usage"]["input_tokens"]

    talk(steps)
