"""POST /v1/chat/completions: a conversation through the model's chat template, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field, WithJsonSchema, field_validator
from starlette.requests import Request
from starlette.responses import Response

from engine.client import ChoiceDelta
from engine.errors import InvalidRequest
from engine.sampling_params import MAX_LOGPROBS
from engine.tokenizer import Tokenizer
from server.api.body import RequestBody, json_type, read_json_object, validate, without_nulls
from server.api.generation import Generation, Prompt, Usage, in_thread_if_long
from server.api.logprobs import ChatLogprobs, chat_logprobs
from server.api.sampling import GenerationRequest, Integer, answer_id, check_vocabulary, output_limit
from server.disconnect import unless_disconnected
from server.errors import error_event_body
from server.sse import DONE, EventStream, EventTemplate, event
from server.state import ServerState

_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}},
        {"type": "null"},
    ]
}


class ChatMessage(RequestBody):
    """content: a string, text parts, or null (as in a turn that only called tools)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(GenerationRequest):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.UNSUPPORTED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Integer | None = None
    logprobs: bool = False
    top_logprobs: Integer | None = None
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @field_validator("messages", mode="before")
    @classmethod
    def _drop_nulls_of_messages(cls, value: object) -> object:
        """SDKs send an answer back as they got it, with a null in every field it did not use."""
        if not isinstance(value, list):
            return value
        return [without_nulls(item) if isinstance(item, dict) else item for item in value]

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


class Message(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str = ""
    refusal: None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChunkChoice(msgspec.Struct, omit_defaults=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["chat"])

    @routes.post("/v1/chat/completions", openapi_extra={"x-request-type": ChatRequest.__name__})
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        arrival = time.monotonic()
        data = await read_json_object(request)
        body, headers = validate(ChatRequest, data, strict=state.config.strict)
        answer = await _Answer.start(state, request, body, arrival)
        if body.stream:
            return EventStream(answer, headers=headers)
        content = await unless_disconnected(request.receive, answer.whole())
        return Response(content, headers=headers, media_type="application/json")

    return routes


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as the chat template takes them. Raises InvalidRequest for content that is no text."""
    rendered = []
    for index, message in enumerate(messages):
        _check_content(message.content, f"messages[{index}].content")
        known = {name: getattr(message, name) for name in type(message).model_fields if name in message.model_fields_set}
        rendered.append({**known, "content": message.content})
    return rendered


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or an array of text parts, got {json_type(content)}.", param=where)
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidRequest(
                f"{where}[{index}] is no text part: this server takes text only, no images, audio or files.",
                param=f"{where}[{index}]",
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}[{index}].text must be a string.", param=f"{where}[{index}].text")


class _Answer:
    """One request on its way to being answered."""

    def __init__(self, body: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self.body = body
        self._id = answer_id("chatcmpl", body.request_id)
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._include_usage = body.include_usage
        self._plain_events: dict[int, EventTemplate] = {}
        self.generation: Generation

    @classmethod
    async def start(cls, state: ServerState, request: Request, body: ChatRequest, arrival: float) -> _Answer:
        """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
        model = state.resolve_model(body.model)
        ready = state.require_ready()
        asked, param = body.output_tokens()
        num_logprobs = body.num_logprobs()
        tokenizer = state.client.tokenizer
        token_ids = await _tokenize(body, tokenizer)
        check_vocabulary(token_ids, ready.vocab_size, "messages")
        limit = output_limit(len(token_ids), asked, None, ready, param)
        sampling = body.sampling_params(ready, tokenizer, max_tokens=limit, n=body.n, logprobs=num_logprobs)
        answer = cls(body, model, tokenizer)
        start = Generation.start(state, answer._id, [Prompt(token_ids, None, sampling)], body, arrival)
        answer.generation = await unless_disconnected(request.receive, start)
        return answer

    async def whole(self) -> bytes:
        """The answer to a request that does not stream."""
        choices = [ChatChoice(index, Message(), None, None) for index in range(self.body.n)]
        pieces: list[list[str]] = [[] for _ in choices]
        try:
            async for _, deltas in self.generation.deltas():
                for delta in deltas:
                    choice = choices[delta.choice_index]
                    pieces[delta.choice_index].append(delta.text)
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                    logprobs = self._logprobs(delta)
                    if choice.logprobs is None or logprobs is None:
                        choice.logprobs = choice.logprobs or logprobs
                    else:
                        choice.logprobs.content += logprobs.content
        finally:
            self.generation.close()
        for choice, texts in zip(choices, pieces, strict=True):
            choice.message.content = "".join(texts)
        completion = ChatCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=self.generation.usage()
        )
        return msgspec.json.encode(completion)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, each choice's role first; an error on the way becomes an event too."""
        try:
            async for prompt_index, deltas in self.generation.deltas():
                if chunk := self._chunk(prompt_index, deltas):
                    yield chunk
            if self._include_usage:
                yield event(msgspec.json.encode(self._envelope([], self.generation.usage())))
        except Exception as error:
            yield event(error_event_body(error))
        finally:
            self.generation.close()
        yield DONE

    def set_shortcut(self, send: Callable[[bytes], Awaitable[None] | None]) -> None:
        """See server.sse.EventSource."""

        def take(prompt_index: int, deltas: list[ChoiceDelta]) -> Awaitable[None] | None:
            chunk = self._chunk(prompt_index, deltas)
            return send(chunk) if chunk else None

        self.generation.set_shortcut(take)

    def close(self) -> None:
        self.generation.close()

    def _chunk(self, _prompt_index: int, deltas: list[ChoiceDelta]) -> bytes:
        if len(deltas) == 1:
            return self._event(deltas[0])
        return b"".join([self._event(delta) for delta in deltas])

    def _event(self, delta: ChoiceDelta) -> bytes:
        """One delta's event, after that of the role where it is the choice's first; empty where there is nothing to say."""
        index, begin = delta.choice_index, b""
        plain = self._plain_events.get(index)
        if plain is None:
            plain = EventTemplate(self._encode_chunk(ChunkChoice(index, Delta(content=""), None, None)), "content")
            self._plain_events[index] = plain
            begin = event(self._encode_chunk(ChunkChoice(index, Delta(role="assistant", content=""), None, None)))
        if delta.logprobs is None and delta.finish_reason is None:
            return begin + plain.fill(delta.text) if delta.text else begin
        logprobs = self._logprobs(delta)
        content = Delta(content=delta.text) if delta.text or logprobs is not None else Delta()
        choice = ChunkChoice(index, content, logprobs, delta.finish_reason, delta.stop_reason)
        return begin + event(self._encode_chunk(choice))

    def _encode_chunk(self, choice: ChunkChoice) -> bytes:
        return msgspec.json.encode(self._envelope([choice], None if self._include_usage else msgspec.UNSET))

    def _envelope(self, choices: list[ChunkChoice], usage: Usage | msgspec.UnsetType | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        return None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)


async def _tokenize(body: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """Raises InvalidRequest for what the template refuses, and for a conversation that comes out empty."""
    given = "add_generation_prompt" in body.model_fields_set
    encode = partial(
        tokenizer.encode_chat,
        template_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt if given else not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
    )
    num_chars = sum(len(str(message.content)) for message in body.messages)
    token_ids = await in_thread_if_long(num_chars, encode)
    if not token_ids:
        raise InvalidRequest("messages come out empty from the chat template.", param="messages", code="empty_prompt")
    return token_ids
