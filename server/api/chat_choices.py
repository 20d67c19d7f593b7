"""A chat answer's choices, made of what the parsers give: whole messages, and the deltas of streamed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.api.chat_types import UNSET, Delta, FunctionCall, FunctionDelta, Message, ToolCall, ToolCallDelta
from server.parsers.base import CallArguments, CallStart, Content, Part, Reasoning

NewCallId = Callable[[], str]


class WholeMessage:
    """Gathers the parts of one choice."""

    def __init__(self, new_call_id: NewCallId) -> None:
        self._new_call_id = new_call_id
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case CallStart(_, name):
                    self._calls.append((name, []))
                case CallArguments(_, text):
                    self._calls[-1][1].append(text)

    def message(self) -> Message:
        content: str | None = "".join(self._content)
        reasoning = "".join(self._reasoning)
        calls = [
            ToolCall(id=self._new_call_id(), function=FunctionCall(name, "".join(arguments))) for name, arguments in self._calls
        ]
        if not content and (reasoning or calls):
            content = None
        return Message(content=content, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET)


def message_delta(parts: Sequence[Part], new_call_id: NewCallId) -> Delta:
    """The parts as one delta, in which each call stands once."""
    content = "".join([part.text for part in parts if isinstance(part, Content)])
    reasoning = "".join([part.text for part in parts if isinstance(part, Reasoning)])
    calls: dict[int, ToolCallDelta] = {}
    for part in parts:
        match part:
            case CallStart(index, name):
                calls[index] = ToolCallDelta(index, FunctionDelta("", name), new_call_id(), "function")
            case CallArguments(index, text):
                call = calls.setdefault(index, ToolCallDelta(index, FunctionDelta("")))
                call.function.arguments += text
    return Delta(content=content or None, reasoning_content=reasoning or None, tool_calls=list(calls.values()) or None)
