"""One response on its way: the response object as it fills, whole or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from engine.errors import InvalidRequest
from engine.request_stream import ChoiceDelta
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from server.api.conversation import Reply
from server.api.generation import Usage
from server.api.logprobs import chat_logprobs
from server.api.response_store import OwnedResponses, StoredResponse
from server.api.responses_request import ResponseRequest
from server.api.responses_stream import EventEncoder, OutputBuilder
from server.api.responses_types import (
    ErrorEvent,
    Event,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    LastEvent,
    OutputTokensDetails,
    Reasoning,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from server.errors import error_event_body


class Answer:
    """A response whose generation has begun. `input_items` and `previous`: what it is stored with, once it has ended."""

    def __init__(
        self,
        response: ResponseObject,
        reply: Reply,
        tokenizer: Tokenizer,
        store: OwnedResponses,
        input_items: list[Item],
        previous: StoredResponse | None,
    ) -> None:
        self._response = response
        self._reply = reply
        self._tokenizer = tokenizer
        self._store = store
        self._input_items = input_items
        self._previous = previous
        self._builder = OutputBuilder(reply.new_call_id)
        self._encoder = EventEncoder()

    async def whole(self) -> bytes:
        """The answer to a request that does not stream. Raises RequestFailed."""
        try:
            async for _, deltas in self._reply.deltas():
                for delta in deltas:
                    self._take(delta)
        finally:
            self._reply.close()
        return msgspec.json.encode(self._response)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events. An error on the way is an event too, and the response has failed then."""
        response = self._response
        yield self._encoder.encode(
            [ResponseEvent("response.created", response), ResponseEvent("response.in_progress", response)]
        )
        try:
            async for _, deltas in self._reply.deltas():
                if chunk := self._chunk(0, deltas):
                    yield chunk
        except Exception as error:
            yield self._encoder.encode(self._fail(error))
        finally:
            self._reply.close()

    def set_shortcut(self, send: Callable[[bytes], Awaitable[None] | None]) -> None:
        """See server.sse.EventSource."""

        def take(prompt_index: int, deltas: list[ChoiceDelta]) -> Awaitable[None] | None:
            chunk = self._chunk(prompt_index, deltas)
            return send(chunk) if chunk else None

        self._reply.set_shortcut(take)

    def close(self) -> None:
        self._reply.close()

    def _chunk(self, _prompt_index: int, deltas: list[ChoiceDelta]) -> bytes:
        return self._encoder.encode([event for delta in deltas for event in self._take(delta)])

    def _take(self, delta: ChoiceDelta) -> list[Event]:
        logprobs = () if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs).content
        events = self._builder.take(self._reply.read(delta), logprobs)
        if delta.finish_reason is None:
            return events
        return [*events, *self._finish(is_cut=delta.finish_reason == "length")]

    def _finish(self, *, is_cut: bool) -> list[Event]:
        response = self._response
        events = self._builder.finish(is_cut=is_cut)
        response.status = "incomplete" if is_cut else "completed"
        if is_cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.completed_at = int(time.time())
        return [*events, self._end("response.incomplete" if is_cut else "response.completed")]

    def _fail(self, error: Exception) -> list[Event]:
        """What there is of the answer stays in it, as far as it is whole."""
        code = "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
        told = msgspec.json.decode(error_event_body(error))["error"]
        self._response.status = "failed"
        self._response.error = ResponseError(code, told["message"])
        return [ErrorEvent(told["message"], told["code"], told["param"]), self._end("response.failed")]

    def _end(self, event_type: LastEvent) -> Event:
        """Stored before the client hears of it: it may go on at once."""
        response = self._response
        response.output = self._builder.items
        response.usage = response_usage(self._reply.generation.usage())
        if response.store:
            self._store.put(response, self._input_items, self._previous)
        return ResponseEvent(event_type, response)


def response_usage(usage: Usage) -> ResponseUsage:
    reasoning = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(0 if reasoning is None else reasoning.reasoning_tokens),
        total_tokens=usage.total_tokens,
        octavo=usage.octavo,
    )


def response_object(body: ResponseRequest, response_id: str, model: str, sampling: SamplingParams) -> ResponseObject:
    """What can be said of a response before it begins."""
    extra = body.model_extra or {}
    max_tool_calls = extra.get("max_tool_calls")
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=max_tool_calls if isinstance(max_tool_calls, int) else None,
        metadata=body.metadata,
        model=model,
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=_text_or_none(extra.get("prompt_cache_key")),
        reasoning=Reasoning(body.reasoning.effort),
        safety_identifier=_text_or_none(extra.get("safety_identifier")),
        store=body.store,
        temperature=sampling.temperature,
        text={"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
        tool_choice=body.tool_choice,
        tools=[tool.model_dump() for tool in body.tools],
        top_logprobs=body.top_logprobs,
        top_p=sampling.top_p,
        truncation=body.truncation,
        user=_text_or_none(extra.get("user")),
    )


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
