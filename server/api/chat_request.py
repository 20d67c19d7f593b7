"""The body of POST /v1/chat/completions, and the Conversation that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, field_validator

from engine.errors import InvalidRequest
from engine.sampling_params import MAX_LOGPROBS
from server.api.body import RequestBody, WrongType, json_type
from server.api.conversation import MAX_MESSAGES, Conversation
from server.api.sampling import GenerationRequest, Integer, check_logprobs
from server.api.tools import INSIDE_TOOL_CHOICE, ChatTool, GivenToolChoice, choose_tools, function_tools

_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}},
        {"type": "null"},
    ]
}
_ARGUMENTS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "object"}]}


class ContentPart(RequestBody):
    """A text, or (in a message of the assistant) a refusal."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"prompt_cache_breakpoint"})

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class CalledFunction(RequestBody):
    """arguments: a JSON text as the API gave it, or the object."""

    name: str
    arguments: Annotated[Any, WithJsonSchema(_ARGUMENTS_SCHEMA)]


class GivenToolCall(RequestBody):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"custom": ()}
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"index"})

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(RequestBody):
    """content: a string, text parts, or null (as in a turn that only called tools). reasoning: another name of
    reasoning_content."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (), "function_call": ()}
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"annotations"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[GivenToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatRequest(GenerationRequest):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.UNSUPPORTED,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "parse_tool_calls": (True,),
        "reasoning_format": ("auto", "deepseek"),
        "thinking_budget_tokens": (-1,),
        "thinking_token_budget": (),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "web_search_options": (),
    }
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = GenerationRequest.WITHOUT_EFFECT | {"verbosity"}
    INSIDE: ClassVar[dict[str, Any]] = {"tool_choice": INSIDE_TOOL_CHOICE}

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Integer | None = None
    logprobs: bool = False
    top_logprobs: Integer | None = None
    tools: list[ChatTool] = []
    tool_choice: GivenToolChoice = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    documents: list[dict[str, Any]] = []

    @field_validator("messages", mode="before")
    @classmethod
    def _check_contents(cls, value: object) -> object:
        """Contents are checked here, where their place is known."""
        if not isinstance(value, list) or len(value) > MAX_MESSAGES:
            return value
        return [
            {**message, "content": _checked_content(message["content"], message.get("role"), f"messages[{index}].content")}
            if isinstance(message, dict) and message.get("content") is not None
            else message
            for index, message in enumerate(value)
        ]

    def conversation(self) -> Conversation:
        """What is asked of the model. Raises InvalidRequest naming the field."""
        tools, tool_choice = choose_tools(function_tools(self.tools), self.tool_choice)
        max_tokens, max_tokens_param = self.output_tokens()
        check_logprobs(self.prompt_logprobs, "prompt_logprobs")
        given = "add_generation_prompt" in self.model_fields_set
        return Conversation(
            messages=template_messages(self.messages),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            structured=self.structured_spec(),
            include_reasoning=self.include_reasoning,
            add_generation_prompt=self.add_generation_prompt if given else not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            add_special_tokens=self.add_special_tokens,
            chat_template=self.chat_template,
            template_kwargs=self.template_kwargs(),
            max_tokens=max_tokens,
            max_tokens_param=max_tokens_param,
            n=self.n,
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.prompt_logprobs,
        )

    def template_kwargs(self) -> dict[str, Any]:
        """The variables for the template. What it is told by chat_template_kwargs wins."""
        named: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            named = effort_variables(self.reasoning_effort)
        if self.documents:
            named["documents"] = self.documents
        return {**named, **self.chat_template_kwargs}

    def num_logprobs(self) -> int | None:
        """Best tokens to list, None when logprobs are off. Raises InvalidRequest."""
        if self.top_logprobs is None:
            return 0 if self.logprobs else None
        if not self.logprobs:
            raise InvalidRequest("top_logprobs is allowed only with logprobs: true.", param="top_logprobs")
        if not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(
                f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {self.top_logprobs}.", param="top_logprobs"
            )
        return self.top_logprobs

    def output_tokens(self) -> tuple[int | None, str]:
        """The limit asked for, and the name of the field it is in. Raises InvalidRequest when two names disagree."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest("max_tokens and max_completion_tokens differ: give one.", param="max_tokens")
        asked, name = (old, "max_tokens") if new is None and old is not None else (new, "max_completion_tokens")
        if asked is not None and asked < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {asked}.", param=name)
        return asked, name

    def echoed_text(self) -> str:
        """With `echo`, what the assistant had said already, in front of what it goes on to say."""
        last = self.messages[-1]
        return _text_of(last) if self.echo and last.role == "assistant" else ""


def effort_variables(effort: str) -> dict[str, Any]:
    """`reasoning_effort` for chat templates: under its own name, and "none" also as Qwen's switch."""
    return {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {})}


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them.

    Raises InvalidRequest for what is missing, and for a tool's message that answers no call before it.
    """
    called: dict[str, str] = {}
    rendered = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(f"{where}.tool_calls is for messages of the assistant.", param=f"{where}.tool_calls")
        if message.role != "assistant" and message.content is None:
            raise InvalidRequest(f"{where}.content is missing.", param=f"{where}.content", code="missing_required_parameter")
        if message.role == "tool":
            _check_answered(message, called, where)
        calls = [_template_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)]
        called.update({call["id"]: call["function"]["name"] for call in calls})
        rendered.append(_template_message(message, calls, called))
    return rendered


def _template_message(message: ChatMessage, calls: list[dict[str, Any]], called: Mapping[str, str]) -> dict[str, Any]:
    optional = {
        # Some templates want to be told again which function a result is of.
        "name": message.name or called.get(message.tool_call_id or ""),
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
    }
    content = message.content
    if isinstance(content, list):
        content = [{"type": "text", "text": _part_text(part)} for part in content]
    elif content is None and message.refusal is not None:
        content = message.refusal
    return {"role": message.role, "content": content, **{key: value for key, value in optional.items() if value is not None}}


def _template_call(call: GivenToolCall, where: str) -> dict[str, Any]:
    arguments = call.function.arguments
    if not isinstance(arguments, str | dict):
        param = f"{where}.function.arguments"
        raise WrongType(f"{param} must be a JSON string, got {json_type(arguments)}.", param=param)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _check_answered(message: ChatMessage, called: Mapping[str, str], where: str) -> None:
    param = f"{where}.tool_call_id"
    if message.tool_call_id is None:
        raise InvalidRequest(f"{param} is missing.", param=param, code="missing_required_parameter")
    if message.tool_call_id not in called:
        raise InvalidRequest(f"{param} is the id of none of the tool_calls before it.", param=param)


def _checked_content(content: object, role: object, where: str) -> object:
    """A string as it is, parts as ContentParts. Raises InvalidRequest for content that is no text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise WrongType(f"{where} must be a string or an array of text parts, got {json_type(content)}.", param=where)
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or (kind != "text" and not (kind == "refusal" and role == "assistant")):
            raise InvalidRequest(
                f"{where}[{index}] is no text part: this server takes text only, no images, audio or files.",
                param=f"{where}[{index}]",
                code="unsupported_content",
            )
        if not isinstance(part.get(str(kind)), str):
            raise InvalidRequest(f"{where}[{index}].{kind} must be a string.", param=f"{where}[{index}].{kind}")
        parts.append(ContentPart.model_validate(part))
    return parts


def _part_text(part: ContentPart) -> str:
    return (part.text if part.type == "text" else part.refusal) or ""


def _text_of(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(map(_part_text, message.content))
    return message.content or message.refusal or ""
