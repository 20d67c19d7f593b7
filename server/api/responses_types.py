"""What /v1/responses answers: the response object, its items, and the events that stream it.

https://platform.openai.com/docs/api-reference/responses; the events' order is in server.api.responses_stream.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from server.api.generation import Explanation
from server.api.logprobs import ChatTokenLogprob

ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]
LastEvent: TypeAlias = Literal["response.completed", "response.incomplete", "response.failed"]
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]


class InputText(msgspec.Struct, tag_field="type", tag="input_text", frozen=True):
    text: str


class OutputText(msgspec.Struct, tag_field="type", tag="output_text", frozen=True):
    """logprobs: empty where none were asked for."""

    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(msgspec.Struct, tag_field="type", tag="reasoning_text", frozen=True):
    text: str


class MessageItem(msgspec.Struct, tag_field="type", tag="message", kw_only=True, frozen=True):
    id: str
    status: ItemStatus = "completed"
    role: str
    content: list[InputText | OutputText]


class FunctionCallItem(msgspec.Struct, tag_field="type", tag="function_call", kw_only=True, frozen=True):
    """arguments: JSON text, as the model wrote it."""

    id: str
    status: ItemStatus = "completed"
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(msgspec.Struct, tag_field="type", tag="function_call_output", kw_only=True, frozen=True):
    id: str
    status: ItemStatus = "completed"
    call_id: str
    output: str | list[InputText]


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning", kw_only=True, frozen=True):
    """The model's reasoning in the clear; no summary is made of it."""

    id: str
    status: ItemStatus = "completed"
    summary: list[Any] = []
    content: list[ReasoningText]


Item: TypeAlias = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
OutputItem: TypeAlias = MessageItem | FunctionCallItem | ReasoningItem


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    # The specification wants the number that it charges for; here writing to the cache costs nothing.
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """octavo: only with `explain`."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    octavo: Explanation | None = None


class ResponseError(msgspec.Struct):
    """code: one of the specification's short list."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    reason: str


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class ResponseObject(msgspec.Struct, kw_only=True):
    """Times in seconds since 1970. What the request asked for is repeated, with the values that were used."""

    id: str
    object: str = "response"
    created_at: int
    status: ResponseStatus = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class DeletedResponse(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(msgspec.Struct, kw_only=True):
    """A page of items; first_id and last_id are null in an empty one."""

    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseEvent(msgspec.Struct):
    """How the response as a whole is doing."""

    type: Literal["response.created", "response.in_progress"] | LastEvent
    response: ResponseObject
    sequence_number: int = 0


class ItemEvent(msgspec.Struct):
    """An item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem
    sequence_number: int = 0


class PartEvent(msgspec.Struct):
    """A part of an item begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText
    sequence_number: int = 0


class TextDelta(msgspec.Struct):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    sequence_number: int = 0


class TextDone(msgspec.Struct):
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]
    type: Literal["response.output_text.done"] = "response.output_text.done"
    sequence_number: int = 0


class ReasoningDelta(msgspec.Struct):
    item_id: str
    output_index: int
    content_index: int
    delta: str
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    sequence_number: int = 0


class ReasoningDone(msgspec.Struct):
    item_id: str
    output_index: int
    content_index: int
    text: str
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    sequence_number: int = 0


class ArgumentsDelta(msgspec.Struct):
    item_id: str
    output_index: int
    delta: str
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    sequence_number: int = 0


class ArgumentsDone(msgspec.Struct):
    item_id: str
    output_index: int
    arguments: str
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    sequence_number: int = 0


class ErrorEvent(msgspec.Struct):
    message: str
    code: str | None
    param: str | None
    type: Literal["error"] = "error"
    sequence_number: int = 0


Event: TypeAlias = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)
"""sequence_number: from 0 in every stream, given as the event is encoded."""
