"""/v1/responses over several turns: tools, what is stored, and streams."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from engine.errors import RequestFailed
from tests.server.responses_talk import CALL, WEATHER, Talk, events_of, talk
from tests.server.test_streaming import Connection, LiveClient, settle

TIME = {**WEATHER, "name": "time", "description": "The time in a city."}
MESSAGE_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
REASONING_EVENTS = [name.replace("output_text", "reasoning_text") for name in MESSAGE_EVENTS]
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of the events, each run of equal ones once."""
    names = [event["type"] for event in events]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def without_ids(value: Any) -> Any:
    """The value without ids and times, which differ from answer to answer."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        skipped = {"id", "call_id", "item_id", "created_at", "completed_at"}
        return {key: without_ids(item) for key, item in value.items() if key not in skipped}
    return value


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_tool_loop_of_two_turns(is_stored: bool) -> None:
    async def steps(t: Talk) -> None:
        t.say(CALL)
        given: list[Any] = [{"role": "user", "content": "Weather in Oslo?"}]
        first = await t.sdk.responses.create(model="tiny", input=given, tools=[WEATHER], store=is_stored)  # type: ignore[list-item]
        (call,) = first.output
        assert call.type == "function_call" and call.name == "weather" and json.loads(call.arguments) == {"city": "Oslo"}
        assert '"name": "weather"' in t.prompt() and first.status == "completed"
        t.say("It rains.")
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        if is_stored:
            second = await t.sdk.responses.create(model="tiny", previous_response_id=first.id, input=[output])  # type: ignore[list-item]
        else:
            second = await t.sdk.responses.create(model="tiny", input=[*given, call, output])  # type: ignore[list-item]
        assert second.output_text == "It rains."
        user, assistant, tool = t.messages()
        assert user["content"] == "Weather in Oslo?" and tool["content"] == "rain"
        assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == call.call_id

    talk(steps)


def test_text_and_several_calls() -> None:
    async def steps(t: Talk) -> None:
        t.say(f"Let me see.\n{CALL}\n{CALL}")
        response = await t.create(tools=[WEATHER])
        assert [item["type"] for item in response["output"]] == ["message", "function_call", "function_call"]
        assert response["output"][1]["call_id"] != response["output"][2]["call_id"]
        response = await t.create(tools=[WEATHER], parallel_tool_calls=False)
        assert [item["type"] for item in response["output"]] == ["message", "function_call"]
        assert (await t.create())["output"][0]["content"][0]["text"] == f"Let me see.\n{CALL}\n{CALL}"

    talk(steps)


def test_tool_choice() -> None:
    both = [WEATHER, TIME]

    async def steps(t: Talk) -> None:
        await t.create(tools=both)
        assert t.client.sampling[-1].structured is None
        await t.create(tools=both, tool_choice="none")
        assert "weather" not in t.prompt()
        await t.create(tools=both, tool_choice="required")
        required = t.client.sampling[-1].structured
        assert required is not None and "weather" in required.text and "time" in required.text
        choice = {"type": "function", "name": "time"}
        response = await t.create(tools=both, tool_choice=choice)
        named = t.client.sampling[-1].structured
        assert named is not None and "weather" not in named.text and "time" in named.text
        assert response["tool_choice"] == choice
        allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
        response = await t.create(tools=both, tool_choice=allowed)
        forced = t.client.sampling[-1].structured
        assert forced is not None and "weather" not in forced.text and response["tool_choice"] == allowed
        await t.create(tools=both, tool_choice={**allowed, "mode": "auto"})
        assert t.client.sampling[-1].structured is None and "weather" not in t.prompt()
        await t.create(tools=[{**WEATHER, "strict": True}])
        assert t.client.sampling[-1].structured is not None

    talk(steps)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "async": True}]}, "tools[0].async"),
        ({"tools": [{**WEATHER, "parameters": 3}]}, "tools[0].parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{**WEATHER, "name": "two words"}]}, "tools[0].name"),
        ({"tools": [{**TIME, "name": f"f{index}"} for index in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "tools": [WEATHER]}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}, "tools": [WEATHER]},
            "tool_choice",
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "x", "tools": [{"name": "weather"}]}, "tools": [WEATHER]},
            "tool_choice",
        ),
    ],
)
def test_tools_that_are_refused(body: dict[str, Any], param: str) -> None:
    async def steps(t: Talk) -> None:
        assert (await t.refused(**body))[0] == param

    talk(steps)


def test_a_chain_of_turns() -> None:
    async def steps(t: Talk) -> None:
        previous = None
        for turn in range(4):
            t.say(f"answer {turn}")
            response = await t.create(input=f"question {turn}", previous_response_id=previous, instructions=f"be {turn}")
            assert response["previous_response_id"] == previous
            previous = response["id"]
        contents = [message["content"] for message in t.messages()]
        talked = [f"{word} {turn}" for turn in range(3) for word in ("question", "answer")]
        assert contents == ["be 3", *talked, "question 3"]
        # A turn can be built on more than once.
        await t.create(input="other", previous_response_id=previous)
        await t.create(input="another", previous_response_id=previous)
        assert [message["content"] for message in t.messages()] == [*talked, "question 3", "answer 3", "another"]

    talk(steps)


def test_what_is_stored_can_be_read_and_deleted() -> None:
    async def steps(t: Talk) -> None:
        made = await t.create(input="one", metadata={"a": "b"})
        kept = (await t.http.get(f"/v1/responses/{made['id']}")).json()
        assert kept == made
        assert (await t.sdk.responses.retrieve(made["id"])).output_text == "Hello world"
        await t.sdk.responses.delete(made["id"])
        with pytest.raises(openai.NotFoundError):
            await t.sdk.responses.retrieve(made["id"])
        assert (await t.http.delete(f"/v1/responses/{made['id']}")).status_code == 404
        wanted = ("previous_response_id", "previous_response_not_found")
        assert await t.refused(previous_response_id=made["id"]) == wanted
        other = await t.create()
        deleted = await t.http.delete(f"/v1/responses/{other['id']}")
        assert deleted.json() == {"id": other["id"], "object": "response", "deleted": True}

    talk(steps)


def test_what_is_not_to_be_stored_is_not() -> None:
    async def steps(t: Talk) -> None:
        response = await t.create(store=False)
        assert response["store"] is False
        assert (await t.http.get(f"/v1/responses/{response['id']}")).status_code == 404
        assert (await t.refused(previous_response_id=response["id"]))[1] == "previous_response_not_found"

    talk(steps)


def test_the_store_holds_as_many_as_it_is_told() -> None:
    async def two(t: Talk) -> None:
        made = [(await t.create())["id"] for _ in range(3)]
        assert [(await t.http.get(f"/v1/responses/{name}")).status_code for name in made] == [404, 200, 200]

    async def none(t: Talk) -> None:
        response = await t.create(store=True)
        assert response["store"] is False
        assert (await t.http.get(f"/v1/responses/{response['id']}")).status_code == 404

    talk(two, response_store_size=2)
    talk(none, response_store_size=0)


def test_input_items() -> None:
    async def steps(t: Talk) -> None:
        t.say("answer")
        first = await t.create(input=[{"role": "user", "content": str(number)} for number in range(3)])
        second = await t.create(input="last", previous_response_id=first["id"])
        listed = t.sdk.responses.input_items.list
        items = [item.content[0].text async for item in listed(second["id"], order="asc")]  # type: ignore[union-attr]
        assert items == ["0", "1", "2", "answer", "last"]
        page = await listed(second["id"], limit=2)
        assert [item.content[0].text for item in page.data] == ["last", "answer"] and page.has_more  # type: ignore[union-attr]
        page = await listed(second["id"], limit=2, after=page.data[-1].id)  # type: ignore[arg-type]
        assert [item.content[0].text for item in page.data] == ["2", "1"]  # type: ignore[union-attr]
        for wrong in ("limit=0", "limit=101", "limit=x", "order=up", "after=nobody"):
            answer = await t.http.get(f"/v1/responses/{second['id']}/input_items?{wrong}")
            assert answer.status_code == 400 and answer.json()["error"]["param"] == wrong.split("=")[0]
        assert (await t.http.get("/v1/responses/resp_none/input_items")).status_code == 404

    talk(steps)


def test_item_references() -> None:
    async def steps(t: Talk) -> None:
        t.say("answer")
        first = await t.create(input=[{"role": "user", "content": "q", "id": "msg_mine"}])
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        await t.create(input=[{"id": "msg_mine"}, reference, {"role": "user", "content": "again"}])
        assert [message["content"] for message in t.messages()] == ["q", "answer", "again"]

    talk(steps)


def test_there_is_nothing_in_the_background() -> None:
    async def steps(t: Talk) -> None:
        made = await t.create()
        with pytest.raises(openai.BadRequestError):
            await t.sdk.responses.cancel(made["id"])
        assert (await t.http.post("/v1/responses/resp_none/cancel")).status_code == 404
        answer = await t.http.get(f"/v1/responses/{made['id']}?stream=true")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream"

    talk(steps)


def test_the_order_of_a_stream() -> None:
    async def steps(t: Talk) -> None:
        t.say(f"<think>so</think>Let me see.\n{CALL}\n{CALL}")
        events = await t.stream(tools=[WEATHER])
        begin, end = ["response.created", "response.in_progress"], ["response.completed"]
        assert kinds(events) == [*begin, *REASONING_EVENTS, *MESSAGE_EVENTS, *CALL_EVENTS, *CALL_EVENTS, *end]
        assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
        assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
        final = events[-1]["response"]
        assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
        arguments = "".join(event["delta"] for event in events if "arguments.delta" in event["type"])
        assert arguments == "".join(item["arguments"] for item in final["output"][2:])
        kept = (await t.http.get(f"/v1/responses/{final['id']}")).json()
        assert kept == final

    talk(steps, reasoning_parser="think")


@pytest.mark.parametrize(
    "script",
    [
        "Hello world",
        "<think>so",
        f"<think>so</think>\n\nYes {CALL}",
        f"{CALL} and then",
        f"{CALL[:40]}",
        "",
    ],
)
@pytest.mark.parametrize("limit", [None, 12])
def test_a_stream_says_what_the_whole_answer_says(script: str, limit: int | None) -> None:
    body: dict[str, Any] = {
        "tools": [WEATHER],
        "include": ["message.output_text.logprobs"],
        "max_output_tokens": limit,
        "seed": 1,
    }

    async def steps(t: Talk) -> None:
        t.say(script)
        whole = await t.create(**body)
        events = await t.stream(**body)
        assert without_ids(events[-1]["response"]) == without_ids(whole)
        assert events[-1]["type"] == f"response.{whole['status']}"
        async with t.sdk.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:  # type: ignore[list-item]
            final = await stream.get_final_response()
        assert final.status == "completed"

    talk(steps, reasoning_parser="think")


def test_logprobs_in_a_stream() -> None:
    async def steps(t: Talk) -> None:
        events = await t.stream(include=["message.output_text.logprobs"], top_logprobs=1, max_output_tokens=2)
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["H"], ["e"]]
        assert all(len(entry["top_logprobs"]) == 1 for event in deltas for entry in event["logprobs"])
        (done,) = [event for event in events if event["type"] == "response.output_text.done"]
        assert [entry["token"] for entry in done["logprobs"]] == ["H", "e"]

    talk(steps)


def test_an_error_in_the_middle_of_a_stream() -> None:
    async def steps(t: Talk) -> None:
        t.client.fail_after, t.client.stream_error = 3, RequestFailed("It broke.")
        events = await t.stream()
        error, failed = events[-2:]
        assert (error["type"], error["message"], error["code"]) == ("error", "It broke.", "request_failed")
        assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
        assert failed["response"]["error"] == {"code": "server_error", "message": "It broke."}
        assert failed["response"]["usage"]["output_tokens"] == 3

    talk(steps)


def test_events_of_a_live_stream_come_one_by_one() -> None:
    async def run() -> None:
        client = LiveClient()
        connection = Connection(client, "/v1/responses", input="hi", messages=None)
        await settle()
        assert len(connection.chunks) == 1  # created, in progress
        client.say(0, "Hel")
        await settle()
        assert len(connection.chunks) == 4
        client.say(0, "lo", finish="stop")
        await settle()
        await connection.over
        events = events_of(b"".join(connection.chunks).decode())
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_goes_on_for_a_client_that_is_gone(stream: bool) -> None:
    async def run() -> None:
        client = LiveClient()
        connection = Connection(client, "/v1/responses", input="hi", messages=None, stream=stream, request_id="x")
        await settle()
        client.say(0, "Hel")
        await settle()
        connection.gone.set()
        await settle()
        await connection.over
        assert client.aborted == ["0"]

    asyncio.run(run())
