"""The input of /v1/responses: items as they come in, as they are kept, and as messages for the chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationError, WithJsonSchema

from engine.errors import InvalidRequest
from server.api.body import RequestBody, WrongType, invalid_request, json_type, without_nulls
from server.api.responses_stream import new_id
from server.api.responses_types import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)

_TEXT_PARTS = {
    "type": "array",
    "items": {"type": "object", "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}}},
}
Text = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_PARTS]})]
_Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class GivenPart(RequestBody):
    """A text of an item; what it must be depends on the item."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs", "prompt_cache_breakpoint"})

    type: Literal["input_text", "output_text", "refusal", "reasoning_text"]
    text: Any = None
    refusal: Any = None


_PART_TYPES = ("input_text", "output_text", "refusal", "reasoning_text")


class _GivenItem(RequestBody):
    """id, status: as an answer of ours had them; an item without an id gets one."""

    # Of calls by programs, which there are none here.
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"async", "caller", "namespace"})

    id: str | None = Field(default=None, max_length=256)
    status: _Status = "completed"


class GivenMessage(_GivenItem):
    """content: a string, or text parts (input_text; output_text and refusal in what the assistant said)."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = _GivenItem.WITHOUT_EFFECT | {"phase"}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text


class GivenFunctionCall(_GivenItem):
    """A call that the model made in an earlier turn; arguments is JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class GivenFunctionCallOutput(_GivenItem):
    """What the function of that call returned: a string, or input_text parts."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class GivenReasoning(_GivenItem):
    """Thoughts of an earlier turn. Of summary and encrypted_content no use is made: the text stands in content."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = _GivenItem.WITHOUT_EFFECT | {"encrypted_content", "summary"}

    type: Literal["reasoning"]
    content: list[Any] = []


class GivenReference(RequestBody):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: str


GivenItem: TypeAlias = GivenMessage | GivenFunctionCall | GivenFunctionCallOutput | GivenReasoning | GivenReference
_ITEM_TYPES: dict[str, type[GivenItem]] = {
    "message": GivenMessage,
    "function_call": GivenFunctionCall,
    "function_call_output": GivenFunctionCallOutput,
    "reasoning": GivenReasoning,
    "item_reference": GivenReference,
}


def parse_input(value: object) -> str | list[GivenItem]:
    """Raises InvalidRequest for what is no text and no item that this server takes."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise WrongType(f"input must be a string or an array of items, got {json_type(value)}.", param="input")
    return [_parse_item(item, f"input[{index}]") for index, item in enumerate(value)]


def _parse_item(value: object, where: str) -> GivenItem:
    if not isinstance(value, dict):
        raise WrongType(f"{where} must be an object, got {json_type(value)}.", param=where)
    kind = value.get("type")
    if kind is None:  # messages may leave it out, and so may references
        kind = "message" if "role" in value or "id" not in value else "item_reference"
    item_type = _ITEM_TYPES.get(kind) if isinstance(kind, str) else None
    if item_type is None:
        raise InvalidRequest(
            f"{where}.type must be one of {', '.join(_ITEM_TYPES)}: this server has function tools only.",
            param=f"{where}.type",
            code="unsupported_content",
        )
    try:
        return item_type.model_validate({name: _with_parts(field) for name, field in without_nulls(value).items()})
    except ValidationError as error:
        raise invalid_request(error, where) from None


def _with_parts(field: object) -> object:
    """A content's parts as GivenPart, so that what is unknown in them is found; whatever is none stays, to be refused."""
    if not isinstance(field, list):
        return field
    return [
        GivenPart.model_validate(part) if isinstance(part, dict) and part.get("type") in _PART_TYPES else part for part in field
    ]


def to_items(given: str | Sequence[GivenItem], find: Callable[[str], Item | None]) -> list[Item]:
    """The items as they are kept. find: an item of a stored response, by its id. Raises InvalidRequest."""
    if isinstance(given, str):
        return [MessageItem(id=new_id("msg"), role="user", content=[InputText(given)])]
    return [_to_item(item, f"input[{index}]", find) for index, item in enumerate(given)]


def _to_item(given: GivenItem, where: str, find: Callable[[str], Item | None]) -> Item:
    match given:
        case GivenMessage():
            texts = _texts(given.content, f"{where}.content", is_answer=given.role == "assistant")
            part_type = OutputText if given.role == "assistant" else InputText
            content: list[InputText | OutputText] = [part_type(text) for text in texts]
            return MessageItem(id=given.id or new_id("msg"), status=given.status, role=given.role, content=content)
        case GivenFunctionCall():
            return FunctionCallItem(
                id=given.id or new_id("fc"),
                status=given.status,
                call_id=given.call_id,
                name=given.name,
                arguments=given.arguments,
            )
        case GivenFunctionCallOutput():
            is_text = isinstance(given.output, str)
            output = given.output if is_text else [InputText(text) for text in _texts(given.output, f"{where}.output")]
            return FunctionCallOutputItem(
                id=given.id or new_id("fco"), status=given.status, call_id=given.call_id, output=output
            )
        case GivenReasoning():
            thoughts = _texts(given.content, f"{where}.content", kinds=("reasoning_text",))
            content_parts = [ReasoningText(text) for text in thoughts]
            return ReasoningItem(id=given.id or new_id("rs"), status=given.status, content=content_parts)
        case GivenReference():
            item = find(given.id)
            if item is None:
                raise InvalidRequest(f"{where}.id is no item of a stored response.", param=f"{where}.id", code="item_not_found")
            return item


def _texts(
    content: object, where: str, *, is_answer: bool = False, kinds: tuple[str, ...] = ("input_text", "output_text")
) -> list[str]:
    """The texts of a content. Raises InvalidRequest for anything that is no text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise WrongType(f"{where} must be a string or an array of text parts, got {json_type(content)}.", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.type if isinstance(part, GivenPart) else None
        field = "refusal" if is_answer and kind == "refusal" else "text"
        if kind not in kinds and field == "text":
            raise InvalidRequest(
                f"{where}[{index}] is no part of type {' or '.join(kinds)}: this server takes text only, no images or files.",
                param=f"{where}[{index}]",
                code="unsupported_content",
            )
        text = getattr(part, field)
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{index}].{field} must be a string.", param=f"{where}[{index}].{field}")
        texts.append(text)
    return texts


def check_calls(items: Sequence[Item]) -> None:
    """Raises InvalidRequest unless every call has its output, and every output its call before it."""
    answered: dict[str, bool] = {}
    for item in items:
        if isinstance(item, FunctionCallItem):
            answered[item.call_id] = False
        elif isinstance(item, FunctionCallOutputItem):
            if item.call_id not in answered:
                raise InvalidRequest(
                    "input has a function_call_output whose call_id belongs to no function_call.", param="input"
                )
            answered[item.call_id] = True
    if not all(answered.values()):
        raise InvalidRequest("input has a function_call without its function_call_output.", param="input")


def to_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as the chat template takes them: thoughts, text and calls of one turn are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    names = {item.call_id: item.name for item in items if isinstance(item, FunctionCallItem)}
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                _assistant(messages, ("content", "tool_calls"))["content"] = _content(item.content)
            case MessageItem():
                messages.append({"role": item.role, "content": _content(item.content)})
            case FunctionCallItem():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _assistant(messages, ()).setdefault("tool_calls", []).append(call)
            case FunctionCallOutputItem():
                output = item.output if isinstance(item.output, str) else _content(item.output)
                answer = {"role": "tool", "tool_call_id": item.call_id, "name": names[item.call_id]}
                messages.append({**answer, "content": output})
            case ReasoningItem() if item.content:
                thoughts = "".join(part.text for part in item.content)
                _assistant(messages, ("content", "tool_calls", "reasoning_content"))["reasoning_content"] = thoughts
    for message in messages:
        message.setdefault("content", None)
    return messages


def _assistant(messages: list[dict[str, Any]], unless: tuple[str, ...]) -> dict[str, Any]:
    """The turn that an assistant's item belongs to: the last message, unless it has one of these fields; or a new one."""
    if messages and messages[-1]["role"] == "assistant" and not any(field in messages[-1] for field in unless):
        return messages[-1]
    messages.append({"role": "assistant"})
    return messages[-1]


def _content(parts: Sequence[InputText | OutputText]) -> str | list[dict[str, Any]]:
    """A single text as such: not every template takes parts."""
    if len(parts) == 1:
        return parts[0].text
    return [{"type": "text", "text": part.text} for part in parts]


def _is_users(item: Item) -> bool:
    return isinstance(item, MessageItem) and item.role == "user"


def count_turns(items: Sequence[Item]) -> int:
    """A turn is what a user says, and all that follows from it."""
    return sum(map(_is_users, items))


def without_turns(items: Sequence[Item], num_turns: int) -> list[Item]:
    """The items without the oldest turns; what the system or the developer said stays, an output without its call does not."""
    begins = [index for index, item in enumerate(items) if _is_users(item)]
    if num_turns == 0 or not begins:
        return list(items)
    cut = begins[num_turns] if num_turns < len(begins) else len(items)
    said = [item for item in items[:cut] if isinstance(item, MessageItem) and item.role in ("system", "developer")]
    calls = {item.call_id for item in items[cut:] if isinstance(item, FunctionCallItem)}
    late = [item for item in items[cut:] if not isinstance(item, FunctionCallOutputItem) or item.call_id in calls]
    return [*said, *late]
