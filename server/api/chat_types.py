"""The answers of POST /v1/chat/completions: whole, and in chunks."""

from __future__ import annotations

import msgspec

from server.api.generation import Usage
from server.api.logprobs import ChatLogprobs, PromptLogprobs

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET


class FunctionCall(msgspec.Struct):
    """arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class Message(msgspec.Struct, kw_only=True):
    """content: null where there are only calls or thoughts."""

    role: str = "assistant"
    content: str | None = ""
    refusal: None = None
    reasoning_content: str | Unset = UNSET
    tool_calls: list[ToolCall] | Unset = UNSET


class FunctionDelta(msgspec.Struct):
    arguments: str
    name: str | Unset = UNSET


class ToolCallDelta(msgspec.Struct):
    """id, type and the function's name come with a call's first one."""

    index: int
    function: FunctionDelta
    id: str | Unset = UNSET
    type: str | Unset = UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChunkChoice(msgspec.Struct, omit_defaults=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """prompt_logprobs, prompt_token_ids: only when asked for."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | Unset = UNSET
    prompt_token_ids: list[int] | Unset = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """prompt_logprobs, prompt_token_ids: with the first one, when asked for."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | Unset | None = UNSET
    prompt_logprobs: PromptLogprobs | Unset = UNSET
    prompt_token_ids: list[int] | Unset = UNSET
