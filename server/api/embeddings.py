"""POST /v1/embeddings: texts or token ids in, one vector each out, from the last hidden states of the model that is served."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import msgspec
from fastapi import APIRouter
from pydantic import Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.client import Embedding
from engine.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, RequestFailed
from engine.messages import EngineReady, Pooling
from server.access import cache_salt
from server.api.body import read_json_object, validate
from server.api.generation import TIME_DIGITS
from server.api.prompt_log import log_prompts
from server.api.prompts import PROMPT_SCHEMA, read_prompts
from server.api.sampling import Integer, Priority, truncate_prompt
from server.api.time_limits import TimeLimit
from server.backlog import Ticket, Work
from server.disconnect import unless_disconnected
from server.metrics import Finished
from server.request_record import RequestRecord, current
from server.state import ServerState

FOREIGN_IDS_HINT = (
    "They look like another tokenizer's: LangChain's OpenAIEmbeddings sends OpenAI's unless it is made with "
    "check_embedding_ctx_length=False."
)

Result = TypeVar("Result")


class EmbeddingRequest(TimeLimit):
    """dimensions: None gives the whole hidden state. pooling: None is the server's own, `embedding_pooling`."""

    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"user"})

    input: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Integer | None = None
    pooling: Pooling | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: Integer | None = None
    priority: Priority = 0
    cache_salt: str = Field(default="", max_length=256)
    explain: bool = False


class EmbeddingItem(msgspec.Struct):
    """embedding: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingExplanation(msgspec.Struct):
    """For `explain: true`: of several inputs the longest times, and the sum of the tokens that a cache served."""

    queue_s: float
    prefill_s: float
    total_s: float
    cached_tokens: int


class EmbeddingUsage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    total_tokens: int
    octavo: EmbeddingExplanation | None = None


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["embeddings"])

    @routes.post("/v1/embeddings", openapi_extra={"x-request-type": EmbeddingRequest.__name__})
    async def create_embeddings(request: Request) -> Response:
        """One vector of length 1 for every input."""
        arrival = time.monotonic()
        data = await read_json_object(request)
        body, headers = validate(EmbeddingRequest, data, strict=state.config.strict)
        body.cache_salt = cache_salt(request.scope, body.cache_salt)
        body.read_time_limits(request.headers)
        model = state.resolve_model(body.model)
        inputs = await _tokenize(state, body)
        answer = await unless_disconnected(request.receive, _answer(state, body, model, inputs, arrival))
        return Response(msgspec.json.encode(answer), headers=headers, media_type="application/json")

    return routes


async def _tokenize(state: ServerState, body: EmbeddingRequest) -> list[list[int]]:
    """The token ids of every input. Raises InvalidRequest for what can be refused before anything is computed."""
    ready = state.require_ready()
    if body.dimensions is not None and not 1 <= body.dimensions <= ready.hidden_size:
        raise InvalidRequest(
            f"dimensions must be between 1 and {ready.hidden_size}, got {body.dimensions}.", param="dimensions"
        )
    prompts = await read_prompts(
        body.input,
        state.client.tokenizer,
        ready,
        add_special_tokens=body.add_special_tokens,
        param="input",
        hint=FOREIGN_IDS_HINT,
    )
    log_prompts(state, prompts)
    inputs = [truncate_prompt(prompt.token_ids, body.truncate_prompt_tokens, 0, None, ready) for prompt in prompts]
    _check_lengths(inputs, ready)
    return inputs


def _check_lengths(inputs: list[list[int]], ready: EngineReady) -> None:
    for index, token_ids in enumerate(inputs):
        if len(token_ids) > ready.max_model_len:
            name = "input" if len(inputs) == 1 else f"input[{index}]"
            raise ContextLengthExceeded(
                f"The prompt is too long: this model's maximum context length is {ready.max_model_len} tokens, but {name} has "
                f"{len(token_ids)} tokens. Shorten it, or have it cut with truncate_prompt_tokens: -1.",
                param="input",
            )


async def _answer(
    state: ServerState, body: EmbeddingRequest, model: str, inputs: list[list[int]], arrival: float
) -> EmbeddingList:
    """All inputs at once, each made ready as it comes. Raises the first error of any; none is left running then."""
    reason = "abort"
    num_tokens = sum(map(len, inputs))
    record = current()
    record.num_prompts, record.prompt_tokens = len(inputs), num_tokens
    deadline_s = body.deadlines(arrival, state.config).whole_s
    tickets = state.backlog.enter([Work(1, len(token_ids)) for token_ids in inputs], state.require_ready())
    try:
        works = [
            _embed(state, body, index, token_ids, deadline_s, ticket)
            for index, (token_ids, ticket) in enumerate(zip(inputs, tickets, strict=True))
        ]
        results = await _all_or_none(works)
        _write_down(record, [embedding for embedding, _ in results])
        reason = "stop"
    except Exception as error:
        reason = "error"
        if isinstance(error, DeadlineExceeded):
            state.metrics.observe_deadline(error.param)
        raise
    finally:
        for ticket in tickets:
            ticket.close()
        for _ in inputs:
            state.metrics.observe_finish(reason)
        state.metrics.observe_tokens(record.key_id, num_tokens, 0)
        if reason == "stop":
            state.metrics.observe_request(
                Finished(time.monotonic() - arrival, num_tokens, record.cached_tokens, 0, longest=0, max_tokens=0, n=1)
            )
        elif reason == "abort":
            state.metrics.observe_abort()
        record.finish_reasons = [reason]
    usage = EmbeddingUsage(num_tokens, num_tokens)
    if body.explain:
        usage.octavo = _explain([embedding for embedding, _ in results], arrival)
    # The items are JSON already: thousands of vectors, written at once, would hold up the streams.
    data = cast("list[EmbeddingItem]", [item for _, item in results])
    return EmbeddingList(data=data, model=model, usage=usage)


def _write_down(record: RequestRecord, embeddings: list[Embedding]) -> None:
    """For the request's line in the log."""
    record.cached_tokens = sum(embedding.num_cached_tokens for embedding in embeddings)
    record.queue_s = max(embedding.queue_s or 0.0 for embedding in embeddings)
    record.prefill_s = max(embedding.prefill_s or 0.0 for embedding in embeddings)


async def _embed(
    state: ServerState, body: EmbeddingRequest, index: int, token_ids: list[int], deadline_s: float | None, ticket: Ticket
) -> tuple[Embedding, msgspec.Raw]:
    try:
        embedding = await state.client.embed(
            token_ids,
            pooling=body.pooling or state.config.embedding_pooling,
            priority=body.priority,
            cache_salt=body.cache_salt,
            deadline_s=deadline_s,
        )
    except InvalidRequest as error:  # the engine speaks of prompts
        raise type(error)(error.message, param="input", code=error.code) from None
    finally:
        ticket.close()
    state.metrics.observe_prompt(embedding.queue_s, embedding.prefill_s)
    if embedding.queue_s is not None and embedding.prefill_s is not None:
        current().add_phases(embedding.queue_s, embedding.prefill_s)
    item = EmbeddingItem(index, _unit_vector(embedding.vector, body.dimensions, body.encoding_format))
    return embedding, msgspec.Raw(msgspec.json.encode(item))


async def _all_or_none(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results. Raises the first error; the other works are cancelled, and gone when this returns."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _unit_vector(vector: bytes, dimensions: int | None, encoding_format: str) -> list[float] | str:
    """The first `dimensions` numbers of a vector, scaled to length 1; zeros stay zeros. Raises RequestFailed where they are no
    numbers."""
    import numpy as np  # here, so that a frontend without embeddings starts without it

    values = np.frombuffer(vector, dtype="<f4")[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(values))
    if not np.isfinite(length):
        raise RequestFailed("The model computed numbers that are not finite for this input.", param="input")
    unit = (values / (length or 1.0)).astype("<f4")
    return base64.b64encode(unit.tobytes()).decode() if encoding_format == "base64" else unit.tolist()


def _explain(embeddings: list[Embedding], arrival: float) -> EmbeddingExplanation:
    return EmbeddingExplanation(
        queue_s=round(max(embedding.queue_s or 0.0 for embedding in embeddings), TIME_DIGITS),
        prefill_s=round(max(embedding.prefill_s or 0.0 for embedding in embeddings), TIME_DIGITS),
        total_s=round(time.monotonic() - arrival, TIME_DIGITS),
        cached_tokens=sum(embedding.num_cached_tokens for embedding in embeddings),
    )
