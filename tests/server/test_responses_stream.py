"""Items and events from parts: the specification's order, and OpenAI's own types of the events."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.logprobs import ChatTokenLogprob
from server.api.responses_stream import EventEncoder, OutputBuilder
from server.parsers.base import CallArguments, CallStart, Content, Part, Reasoning

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def build(*turns: list[Part], is_cut: bool = False) -> tuple[OutputBuilder, list[dict[str, Any]]]:
    """The events of an answer that comes in these pieces."""
    numbers = itertools.count()
    builder, encoder = OutputBuilder(lambda: f"call_{next(numbers)}"), EventEncoder()
    raw = b"".join([*(encoder.encode(builder.take(parts)) for parts in turns), encoder.encode(builder.finish(is_cut=is_cut))])
    decoded = []
    for block in raw.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        decoded.append(event)
    assert [event["sequence_number"] for event in decoded] == list(range(len(decoded)))
    return builder, decoded


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
REASONING = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def test_a_message() -> None:
    builder, events = build([Content("Hel")], [Content("lo")])
    assert types(events) == [*MESSAGE[:2], *["output_text.delta"] * 2, *MESSAGE[3:], "output_item.done"]
    (item,) = builder.items
    assert events[0]["item"] == {"type": "message", "id": item.id, "status": "in_progress", "role": "assistant", "content": []}
    assert {event["item_id"] for event in events[1:-1]} == {item.id}
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo"]
    assert events[-3]["text"] == "Hello"
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert events[-2]["part"] == part
    assert events[-1]["item"]["content"] == [part] and events[-1]["item"]["status"] == "completed"


def test_thoughts_a_message_and_two_calls_one_after_the_other() -> None:
    builder, events = build(
        [Reasoning("hmm"), Content("So")],
        [CallStart(0, "f"), CallArguments(0, "{}"), CallStart(1, "g")],
        [CallArguments(1, '{"a":'), CallArguments(1, "1}")],
    )
    assert types(events) == [
        *REASONING,
        "output_item.done",
        *MESSAGE,
        "output_item.done",
        *CALL,
        *CALL[:1],
        CALL[1],
        *CALL[1:],
    ]
    assert [event["output_index"] for event in events] == sorted(event["output_index"] for event in events)
    thoughts, message, first, second = builder.items
    assert thoughts.content[0].text == "hmm" and message.content[0].text == "So"  # type: ignore[union-attr]
    calls = [(call.name, call.call_id, call.arguments) for call in (first, second)]  # type: ignore[union-attr]
    assert calls == [("f", "call_0", "{}"), ("g", "call_1", '{"a":1}')]
    assert len({item.id for item in builder.items}) == 4
    assert events[-2]["arguments"] == '{"a":1}'


@pytest.mark.parametrize(
    "parts", [[Content("x")], [Reasoning("x")], [Content("x"), CallStart(0, "f"), CallArguments(0, "{")]], ids=lambda parts: "-"
)
def test_an_answer_cut_short_has_its_last_item_incomplete(parts: list[Part]) -> None:
    builder, events = build(parts, is_cut=True)
    assert [item.status for item in builder.items] == ["completed"] * (len(builder.items) - 1) + ["incomplete"]
    assert events[-1]["item"]["status"] == "incomplete"


def test_an_answer_without_text_is_an_empty_message() -> None:
    builder, events = build([])
    assert types(events) == [*MESSAGE[:2], *MESSAGE[3:], "output_item.done"]
    assert builder.items[0].content[0].text == ""  # type: ignore[union-attr]
    only_thoughts, _ = build([Reasoning("x")])
    assert [type(item).__name__ for item in only_thoughts.items] == ["ReasoningItem"]


def test_logprobs_go_with_the_text_of_messages_only() -> None:
    one, two, three, four = (ChatTokenLogprob(text, -0.5, [1], []) for text in "abcd")
    builder = OutputBuilder(lambda: "call")
    builder.take([Reasoning("a")], [one])
    assert builder.take([], [two]) == []  # held back by the parser
    *_, delta = builder.take([Content("bc")], [three])
    assert delta.logprobs == [two, three]  # type: ignore[union-attr]
    builder.take([CallStart(0, "f"), CallArguments(0, "{")], [four])
    builder.finish(is_cut=False)
    assert builder.items[1].content[0].logprobs == [two, three]  # type: ignore[union-attr]
