"""POST /v1/chat/completions: a conversation through the model's chat template, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request_stream import ChoiceDelta
from engine.tokenizer import Tokenizer
from server.access import cache_salt
from server.api.body import read_json_object, validate
from server.api.chat_choices import WholeMessage, message_delta
from server.api.chat_request import ChatRequest
from server.api.chat_types import UNSET, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta, Message, Unset
from server.api.conversation import Conversation, Reply
from server.api.generation import Usage
from server.api.logprobs import ChatLogprobs, PromptLogprobs, chat_logprobs, prompt_logprobs
from server.api.sampling import answer_id
from server.disconnect import unless_disconnected
from server.errors import error_event_body
from server.parsers.base import Content, Part, Reasoning
from server.sse import DONE, EventStream, EventTemplate, event
from server.state import ServerState


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["chat"])

    @routes.post("/v1/chat/completions", openapi_extra={"x-request-type": ChatRequest.__name__})
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        arrival = time.monotonic()
        data = await read_json_object(request)
        body, headers = validate(ChatRequest, data, strict=state.config.strict)
        body.cache_salt = cache_salt(request.scope, body.cache_salt)
        body.read_time_limits(request.headers)
        answer = await _Answer.start(state, request, body, arrival)
        if body.stream:
            return EventStream(answer, headers=headers)
        content = await unless_disconnected(request.receive, answer.whole())
        return Response(content, headers=headers, media_type="application/json")

    return routes


class _Answer:
    """One request on its way to being answered."""

    def __init__(self, body: ChatRequest, model: str, tokenizer: Tokenizer) -> None:
        self._body = body
        self._id = answer_id("chatcmpl", body.request_id)
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._include_usage = body.include_usage
        self._echoed = body.echoed_text()
        # Without a template every event is encoded as a whole.
        self._has_plain_events = not (body.continuous_usage or body.return_token_ids)
        self._plain_events: dict[tuple[int, str], EventTemplate] = {}
        self._begun: set[int] = set()
        self.reply: Reply

    @classmethod
    async def start(cls, state: ServerState, request: Request, body: ChatRequest, arrival: float) -> _Answer:
        """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
        model = state.resolve_model(body.model)
        state.require_ready()
        answer = cls(body, model, state.client.tokenizer)
        conversation: Conversation = body.conversation()
        answer.reply = await Reply.start(state, request.receive, answer._id, conversation, body, arrival)
        return answer

    async def whole(self) -> bytes:
        """The answer to a request that does not stream."""
        choices = [ChatChoice(index, Message(), None, None) for index in range(self._body.n)]
        messages = [WholeMessage(self.reply.new_call_id) for _ in choices]
        asked: PromptLogprobs | Unset = UNSET
        for message in messages if self._echoed else ():
            message.add([Content(self._echoed)])
        try:
            async for _, deltas in self.reply.deltas():
                for delta in deltas:
                    messages[delta.choice_index].add(self.reply.read(delta))
                    self._extend(choices[delta.choice_index], delta)
                    asked = self._prompt_logprobs(delta) or asked
        finally:
            self.reply.close()
        for choice, message in zip(choices, messages, strict=True):
            choice.message = message.message()
        completion = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self.reply.generation.usage(),
            prompt_logprobs=asked,
            prompt_token_ids=self.reply.prompt_token_ids if self._body.return_token_ids else UNSET,
        )
        return msgspec.json.encode(completion)

    def _extend(self, choice: ChatChoice, delta: ChoiceDelta) -> None:
        """Add what a delta says beside the message."""
        choice.finish_reason, choice.stop_reason = self.reply.finish_reason(delta), delta.stop_reason
        if self._body.return_token_ids:
            choice.token_ids = [*(choice.token_ids or ()), *delta.token_ids]
        logprobs = self._logprobs(delta)
        if choice.logprobs is None or logprobs is None:
            choice.logprobs = choice.logprobs or logprobs
        else:
            choice.logprobs.content += logprobs.content

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, each choice's role first; an error on the way becomes an event too."""
        try:
            async for prompt_index, deltas in self.reply.deltas():
                if chunk := self._chunk(prompt_index, deltas):
                    yield chunk
            if self._include_usage:
                yield event(msgspec.json.encode(self._envelope([], self.reply.generation.usage())))
        except Exception as error:
            yield event(error_event_body(error))
        finally:
            self.reply.close()
        yield DONE

    def set_shortcut(self, send: Callable[[bytes], Awaitable[None] | None]) -> None:
        """See server.sse.EventSource."""

        def take(prompt_index: int, deltas: list[ChoiceDelta]) -> Awaitable[None] | None:
            chunk = self._chunk(prompt_index, deltas)
            return send(chunk) if chunk else None

        self.reply.set_shortcut(take)

    def close(self) -> None:
        self.reply.close()

    def _chunk(self, _prompt_index: int, deltas: list[ChoiceDelta]) -> bytes:
        if len(deltas) == 1:
            return self._events(deltas[0])
        return b"".join([self._events(delta) for delta in deltas])

    def _events(self, delta: ChoiceDelta) -> bytes:
        """One delta's event, after that of the role where it is the choice's first; empty where there is nothing to say."""
        index = delta.choice_index
        begin = b"" if index in self._begun else self._begin(delta)
        is_plain = self._has_plain_events and delta.logprobs is None and delta.finish_reason is None
        if is_plain and self.reply.is_plain:
            return begin + self._fill(index, "content", delta.text) if delta.text else begin
        parts = self.reply.read(delta)
        if is_plain and not parts:
            return begin
        if is_plain and len(parts) == 1:
            match parts[0]:
                case Content(text):
                    return begin + self._fill(index, "content", text)
                case Reasoning(text):
                    return begin + self._fill(index, "reasoning_content", text)
        return begin + self._event(delta, parts)

    def _begin(self, delta: ChoiceDelta) -> bytes:
        """The event of the role, with what is to be said of the prompt; and the text that is echoed."""
        index = delta.choice_index
        first = self._envelope([ChunkChoice(index, Delta(role="assistant", content=""), None, None)], self._usage_so_far())
        first.prompt_logprobs = self._prompt_logprobs(delta) or UNSET
        if self._body.return_token_ids and not self._begun:
            first.prompt_token_ids = self.reply.prompt_token_ids
        self._begun.add(index)
        echo = self._encode_chunk(ChunkChoice(index, Delta(content=self._echoed), None, None)) if self._echoed else b""
        return event(msgspec.json.encode(first)) + echo

    def _event(self, delta: ChoiceDelta, parts: list[Part]) -> bytes:
        logprobs = self._logprobs(delta)
        token_ids = (delta.token_ids or None) if self._body.return_token_ids else None
        if not parts and logprobs is None and token_ids is None and delta.finish_reason is None:
            return b""
        message = message_delta(parts, self.reply.new_call_id)
        if logprobs is not None and message == Delta():
            message.content = ""
        finish_reason = self.reply.finish_reason(delta)
        return self._encode_chunk(
            ChunkChoice(delta.choice_index, message, logprobs, finish_reason, delta.stop_reason, token_ids)
        )

    def _fill(self, index: int, field: str, text: str) -> bytes:
        template = self._plain_events.get((index, field))
        if template is None:
            empty = Delta(content="") if field == "content" else Delta(reasoning_content="")
            chunk = self._envelope([ChunkChoice(index, empty, None, None)], self._usage_so_far())
            template = self._plain_events[index, field] = EventTemplate(msgspec.json.encode(chunk), field)
        return template.fill(text)

    def _encode_chunk(self, choice: ChunkChoice) -> bytes:
        return event(msgspec.json.encode(self._envelope([choice], self._usage_so_far())))

    def _usage_so_far(self) -> Usage | Unset | None:
        if self._body.continuous_usage:
            return self.reply.generation.usage()
        return None if self._include_usage else UNSET

    def _envelope(self, choices: list[ChunkChoice], usage: Usage | Unset | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        return None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs)

    def _prompt_logprobs(self, delta: ChoiceDelta) -> PromptLogprobs | None:
        entries, num_top = delta.prompt_logprobs, self._body.prompt_logprobs
        if entries is None or num_top is None:
            return None
        return prompt_logprobs(self._tokenizer, self.reply.prompt_token_ids, entries, num_top)
