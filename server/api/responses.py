"""/v1/responses: a conversation as items, streamed or whole; and the responses that are stored for the next turn.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidRequest
from server.access import cache_salt, owner
from server.api.body import IGNORED_FIELDS_HEADER, read_json_object, validate
from server.api.chat_request import effort_variables
from server.api.conversation import Conversation, Reply, prompt_tokens
from server.api.response_store import OwnedResponses, ResponseStore, StoredResponse
from server.api.responses_answer import Answer, response_object
from server.api.responses_input import check_calls, count_turns, to_items, to_messages, without_turns
from server.api.responses_request import ResponseRequest
from server.api.responses_stream import new_id
from server.api.responses_types import DeletedResponse, Item, ItemList
from server.disconnect import unless_disconnected
from server.sse import EventStream
from server.state import ServerState

MAX_LISTED_ITEMS = 100
DEFAULT_LISTED_ITEMS = 20


class InputTokens(msgspec.Struct):
    input_tokens: int
    object: str = "response.input_tokens"


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["responses"])
    store = ResponseStore(state.config.response_store_size)

    def stored(request: Request) -> OwnedResponses:
        return store.of(owner(request.scope))

    @routes.post("/v1/responses", openapi_extra={"x-request-type": ResponseRequest.__name__})
    async def create_response(request: Request) -> Response:
        """Answer input, and what came before it."""
        arrival = time.monotonic()
        body, headers = await _read(state, request)
        with _input_by_its_name():
            answer = await _start(state, stored(request), request, body, arrival)
        if body.stream:
            return EventStream(answer, headers=headers)
        content = await unless_disconnected(request.receive, answer.whole())
        return Response(content, headers=headers, media_type="application/json")

    @routes.post("/v1/responses/input_tokens", openapi_extra={"x-request-type": ResponseRequest.__name__})
    async def count_input_tokens(request: Request) -> Response:
        """How many tokens the input of such a response has."""
        body, headers = await _read(state, request)
        with _input_by_its_name():
            given = await _Given.read(state, stored(request), body)
            count = InputTokens(len(await prompt_tokens(state, given.conversation)))
        return Response(msgspec.json.encode(count), headers=headers, media_type="application/json")

    @routes.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str, stream: str | None = None) -> Response:
        """A stored response."""
        if stream not in (None, "false", "False"):
            raise InvalidRequest("stream is not supported: a stored response has ended.", param="stream")
        return Response(msgspec.json.encode(stored(request).get(response_id).response), media_type="application/json")

    @routes.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        """Take a response out of the store; what was built on it stays."""
        stored(request).delete(response_id)
        return Response(msgspec.json.encode(DeletedResponse(response_id)), media_type="application/json")

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        """Only a response in the background could be cancelled, and there are none: to cancel, close the connection."""
        stored(request).get(response_id)
        raise InvalidRequest("Only a response made with background: true could be cancelled; this server makes none.")

    @routes.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        request: Request,
        response_id: str,
        limit: Annotated[str, Query(description="1 to 100.")] = str(DEFAULT_LISTED_ITEMS),
        order: Annotated[str, Query(description="asc or desc: oldest or newest first.")] = "desc",
        after: Annotated[str | None, Query(description="The item that the page comes after.")] = None,
    ) -> Response:
        """What a stored response was made from, the turns before it included."""
        items = stored(request).get(response_id).input_context()
        content = _page(items, limit, order, after)
        return Response(msgspec.json.encode(content), media_type="application/json")

    return routes


async def _read(state: ServerState, request: Request) -> tuple[ResponseRequest, dict[str, str]]:
    """The body, and the header that lists what changes nothing."""
    data = await read_json_object(request)
    body, headers = validate(ResponseRequest, data, strict=state.config.strict)
    body.cache_salt = cache_salt(request.scope, body.cache_salt)
    body.read_time_limits(request.headers)
    ignored = [*filter(None, [headers.get(IGNORED_FIELDS_HEADER)]), *body.ignored_includes]
    return body, {IGNORED_FIELDS_HEADER: ", ".join(ignored)} if ignored else {}


async def _start(state: ServerState, store: OwnedResponses, request: Request, body: ResponseRequest, arrival: float) -> Answer:
    """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
    given = await _Given.read(state, store, body)
    response_id = new_id("resp") if body.request_id is None else f"resp_{body.request_id}"
    reply = await Reply.start(state, request.receive, response_id, given.conversation, body, arrival)
    response = response_object(body, response_id, given.model, reply.sampling)
    response.store = body.store and state.config.response_store_size > 0
    return Answer(response, reply, state.client.tokenizer, store, given.input_items, given.previous)


class _Given(NamedTuple):
    """A request, looked at. input_items: its own, without those of `previous`."""

    model: str
    input_items: list[Item]
    previous: StoredResponse | None
    conversation: Conversation

    @classmethod
    async def read(cls, state: ServerState, store: OwnedResponses, body: ResponseRequest) -> _Given:
        """Raises OctavoError."""
        model = state.resolve_model(body.model)
        ready = state.require_ready()
        previous = store.previous(body.previous_response_id) if body.previous_response_id is not None else None
        input_items = to_items(body.input, store.item)
        items = [*(previous.conversation() if previous else ()), *input_items]
        check_calls(items)
        conversation = _conversation(body, items)
        if body.truncation == "auto":
            num_tokens = ready.max_model_len - (body.max_output_tokens or 1)
            conversation = await _truncated(state, conversation, body, items, num_tokens)
        return cls(model, input_items, previous, conversation)


def _conversation(body: ResponseRequest, items: Sequence[Item]) -> Conversation:
    """Raises InvalidRequest."""
    effort = {} if body.reasoning.effort is None else effort_variables(body.reasoning.effort)
    return Conversation(
        messages=_messages(body, items),
        tools=body.functions(),
        tool_choice=body.choice(),
        parallel_tool_calls=body.parallel_tool_calls,
        structured=body.structured(),
        template_kwargs={**effort, **body.chat_template_kwargs},
        max_tokens=body.output_tokens(),
        max_tokens_param="max_output_tokens",
        logprobs=body.num_logprobs(),
    )


def _messages(body: ResponseRequest, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The instructions are this request's own: those of turns before it are no part of the conversation."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    return [*instructions, *to_messages(items)]


async def _truncated(
    state: ServerState, conversation: Conversation, body: ResponseRequest, items: list[Item], num_tokens: int
) -> Conversation:
    """The conversation without as many of its oldest turns as it takes to come down to `num_tokens`; the last one stays."""

    def without(num_turns: int) -> Conversation:
        return msgspec.structs.replace(conversation, messages=_messages(body, without_turns(items, num_turns)))

    too_few, enough = -1, max(count_turns(items) - 1, 0)
    num_turns = 0  # the likeliest comes first
    while enough - too_few > 1:
        fits = len(await prompt_tokens(state, without(num_turns))) <= num_tokens
        too_few, enough = (too_few, num_turns) if fits else (num_turns, enough)
        num_turns = (too_few + enough) // 2
    return without(enough)


@contextmanager
def _input_by_its_name() -> Iterator[None]:
    """What chat completions call messages is the input here, also where it is at fault."""
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None and error.param.startswith("messages"):
            error.param = "input"
        raise


def _page(items: list[Item], limit: str, order: str, after: str | None) -> ItemList:
    """Raises InvalidRequest."""
    if not limit.isdecimal() or not 1 <= int(limit) <= MAX_LISTED_ITEMS:
        raise InvalidRequest(f"limit must be an integer between 1 and {MAX_LISTED_ITEMS}.", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc.", param="order")
    listed = items if order == "asc" else items[::-1]
    if after is not None:
        places = [index for index, item in enumerate(listed) if item.id == after]
        if not places:
            raise InvalidRequest("after is no item of this response's input.", param="after")
        listed = listed[places[0] + 1 :]
    page = listed[: int(limit)]
    first_id, last_id = (page[0].id, page[-1].id) if page else (None, None)
    return ItemList(data=page, first_id=first_id, last_id=last_id, has_more=len(page) < len(listed))
