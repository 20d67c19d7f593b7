"""The output items of one response as they grow out of parts, and the events that tell of it.

The order of the specification (https://platform.openai.com/docs/api-reference/responses-streaming), for each item in turn:

    output_item.added   content_part.added   output_text.delta …     output_text.done      content_part.done   output_item.done
    output_item.added   content_part.added   reasoning_text.delta …  reasoning_text.done   content_part.done   output_item.done
    output_item.added   function_call_arguments.delta …              function_call_arguments.done              output_item.done

An answer that is not streamed is built the same way, so both always say the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import msgspec

from server.api.logprobs import ChatTokenLogprob
from server.api.responses_types import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    FunctionCallItem,
    ItemEvent,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    PartEvent,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningText,
    TextDelta,
    TextDone,
)
from server.parsers.base import CallArguments, CallStart, Content, Part, Reasoning
from server.sse import event


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


class EventEncoder:
    """Frames events, numbered from 0."""

    def __init__(self) -> None:
        self._num_sent = 0
        self._encode = msgspec.json.Encoder().encode

    def encode(self, events: Sequence[Event]) -> bytes:
        frames = b""
        for item in events:
            item.sequence_number = self._num_sent
            self._num_sent += 1
            frames += event(self._encode(item), item.type)
        return frames


class _Open:
    """The item that grows at the moment."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class _OpenMessage(_Open):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.id = new_id("msg")
        self.logprobs: list[ChatTokenLogprob] = []

    def begin(self) -> list[Event]:
        item = MessageItem(id=self.id, status="in_progress", role="assistant", content=[])
        return [
            ItemEvent("response.output_item.added", self.index, item),
            PartEvent("response.content_part.added", self.id, self.index, 0, OutputText("")),
        ]

    def grow(self, text: str, logprobs: list[ChatTokenLogprob]) -> Event:
        self.pieces.append(text)
        self.logprobs += logprobs
        return TextDelta(self.id, self.index, 0, text, logprobs)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[Event]]:
        part = OutputText(self.text, logprobs=self.logprobs)
        item = MessageItem(id=self.id, status=status, role="assistant", content=[part])
        return item, [
            TextDone(self.id, self.index, 0, part.text, part.logprobs),
            PartEvent("response.content_part.done", self.id, self.index, 0, part),
            ItemEvent("response.output_item.done", self.index, item),
        ]


class _OpenReasoning(_Open):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.id = new_id("rs")

    def begin(self) -> list[Event]:
        item = ReasoningItem(id=self.id, status="in_progress", content=[])
        return [
            ItemEvent("response.output_item.added", self.index, item),
            PartEvent("response.content_part.added", self.id, self.index, 0, ReasoningText("")),
        ]

    def grow(self, text: str) -> Event:
        self.pieces.append(text)
        return ReasoningDelta(self.id, self.index, 0, text)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[Event]]:
        part = ReasoningText(self.text)
        item = ReasoningItem(id=self.id, status=status, content=[part])
        return item, [
            ReasoningDone(self.id, self.index, 0, part.text),
            PartEvent("response.content_part.done", self.id, self.index, 0, part),
            ItemEvent("response.output_item.done", self.index, item),
        ]


class _OpenCall(_Open):
    def __init__(self, index: int, name: str, call_id: str) -> None:
        super().__init__(index)
        self.id = new_id("fc")
        self._name = name
        self._call_id = call_id

    def _item(self, status: ItemStatus, arguments: str) -> FunctionCallItem:
        return FunctionCallItem(id=self.id, status=status, call_id=self._call_id, name=self._name, arguments=arguments)

    def begin(self) -> list[Event]:
        return [ItemEvent("response.output_item.added", self.index, self._item("in_progress", ""))]

    def grow(self, text: str) -> Event:
        self.pieces.append(text)
        return ArgumentsDelta(self.id, self.index, text)

    def end(self, status: ItemStatus) -> tuple[OutputItem, list[Event]]:
        item = self._item(status, self.text)
        return item, [
            ArgumentsDone(self.id, self.index, item.arguments),
            ItemEvent("response.output_item.done", self.index, item),
        ]


class OutputBuilder:
    """Takes the parts of an answer; `items` are those that are complete."""

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.items: list[OutputItem] = []
        self._open: _OpenMessage | _OpenReasoning | _OpenCall | None = None
        self._new_call_id = new_call_id
        self._logprobs: list[ChatTokenLogprob] = []

    def take(self, parts: Sequence[Part], logprobs: Sequence[ChatTokenLogprob] = ()) -> list[Event]:
        """logprobs: of the tokens that came since the last call. They go with the next text of a message.

        A parser may hold text back, so tokens and parts need not come together; those of thoughts and calls are dropped.
        """
        if logprobs:
            self._logprobs += logprobs
        events: list[Event] = []
        for part in parts:
            events += self._take(part)
        return events

    def _take(self, part: Part) -> list[Event]:
        match part:
            case Content(text):
                logprobs, self._logprobs = self._logprobs, []
                if isinstance(self._open, _OpenMessage):
                    return [self._open.grow(text, logprobs)]
                message = _OpenMessage(self._next_index())
                return [*self._begin(message), message.grow(text, logprobs)]
            case Reasoning(text):
                self._logprobs = []
                if isinstance(self._open, _OpenReasoning):
                    return [self._open.grow(text)]
                thoughts = _OpenReasoning(self._next_index())
                return [*self._begin(thoughts), thoughts.grow(text)]
            case CallStart(_, name):
                self._logprobs = []
                return self._begin(_OpenCall(self._next_index(), name, self._new_call_id()))
            case CallArguments(_, text):
                assert isinstance(self._open, _OpenCall), "arguments come right after their call's beginning"
                self._logprobs = []
                return [self._open.grow(text)]

    def finish(self, *, is_cut: bool) -> list[Event]:
        """The end of the answer. is_cut: it ended at the limit of tokens, in the middle of the last item.

        An answer without any text is an empty message.
        """
        events = self._begin(_OpenMessage(0)) if not self.items and self._open is None else []
        return events + self._end("incomplete" if is_cut else "completed")

    def _next_index(self) -> int:
        return len(self.items) + (self._open is not None)

    def _begin(self, item: _OpenMessage | _OpenReasoning | _OpenCall) -> list[Event]:
        events = self._end("completed")
        self._open = item
        return events + item.begin()

    def _end(self, status: ItemStatus) -> list[Event]:
        if self._open is None:
            return []
        item, events = self._open.end(status)
        self.items.append(item)
        self._open = None
        return events
