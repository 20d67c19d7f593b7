"""POST /v1/completions: text or token ids in, text out; one or many prompts, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidRequest
from engine.messages import EngineReady
from engine.request_stream import ChoiceDelta
from engine.sampling_params import MAX_N, SamplingParams
from engine.tokenizer import Tokenizer
from server.access import cache_salt
from server.api.body import read_json_object, validate
from server.api.completion_choices import ChoiceBuilder, CompletionChoice, WholeChoices
from server.api.generation import Generation, Prompt, Usage
from server.api.prompts import PROMPT_SCHEMA, PromptTokens, read_prompts
from server.api.sampling import (
    GenerationRequest,
    Integer,
    answer_id,
    check_logprobs,
    output_limit,
    truncate_prompt,
)
from server.disconnect import unless_disconnected
from server.errors import error_event_body
from server.sse import DONE, EventStream, EventTemplate, event
from server.state import ServerState

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    suffix: str = ""
    echo: bool = False
    logprobs: Integer | None = None
    best_of: Integer | None = None
    add_special_tokens: bool = True

    @property
    def num_generated(self) -> int:
        """Choices to generate for each prompt, of which `n` are returned. Raises InvalidRequest."""
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequest(f"n must be between 1 and {MAX_N}, got {self.n}.", param="n")
        if self.best_of is None:
            return self.n
        if not self.n <= self.best_of <= MAX_N:
            raise InvalidRequest(f"best_of must be between n ({self.n}) and {MAX_N}, got {self.best_of}.", param="best_of")
        if self.stream and self.best_of != self.n:
            raise InvalidRequest("best_of above n cannot be streamed: the best is known at the end.", param="best_of")
        return self.best_of

    def check_prompt_options(self) -> None:
        """Raises InvalidRequest for options that are out of range or exclude each other."""
        check_logprobs(self.logprobs, "logprobs")
        check_logprobs(self.prompt_logprobs, "prompt_logprobs")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequest("max_tokens may be 0 only with echo: true or prompt_logprobs.", param="max_tokens")
        if self.suffix and self.echo:
            raise InvalidRequest("echo is not possible with suffix.", param="echo")
        if self.suffix and self.truncate_prompt_tokens is not None:
            raise InvalidRequest("truncate_prompt_tokens is not possible with suffix.", param="truncate_prompt_tokens")


class Completion(msgspec.Struct, kw_only=True):
    """A whole answer, and (with `usage` left out or null) one chunk of a streamed one."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions", openapi_extra={"x-request-type": CompletionRequest.__name__})
    async def create_completion(request: Request) -> Response:
        """Continue one prompt or many."""
        arrival = time.monotonic()
        data = await read_json_object(request)
        body, headers = validate(CompletionRequest, data, strict=state.config.strict)
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

    def __init__(self, body: CompletionRequest, model: str, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        self.body = body
        self._id = answer_id("cmpl", body.request_id)
        self._created = int(time.time())
        self._model = model
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        # Without a template every event is encoded as a whole.
        self._has_plain_events = not (body.continuous_usage or body.return_token_ids)
        self._plain_events: dict[int, EventTemplate] = {}
        self._builder = ChoiceBuilder(
            tokenizer,
            prompts,
            echo=body.echo,
            skip_special_tokens=body.skip_special_tokens,
            num_logprobs=body.logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
            return_token_ids=body.return_token_ids,
        )
        self.generation: Generation

    @classmethod
    async def start(cls, state: ServerState, request: Request, body: CompletionRequest, arrival: float) -> _Answer:
        """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
        model = state.resolve_model(body.model)
        ready = state.require_ready()
        body.check_prompt_options()
        tokenizer = state.client.tokenizer
        tokens = await read_prompts(
            body.prompt,
            tokenizer,
            ready,
            suffix=body.suffix,
            may_be_empty=True,
            add_special_tokens=body.add_special_tokens,
        )
        prompts = _prompts(body, tokens, tokenizer, ready)
        answer = cls(body, model, tokenizer, prompts)
        start = Generation.start(state, answer._id, prompts, body, arrival)
        answer.generation = await unless_disconnected(request.receive, start, release=Generation.close)
        return answer

    async def whole(self) -> bytes:
        """The answer to a request that does not stream."""
        choices = WholeChoices(self._builder)
        try:
            async for prompt_index, deltas in self.generation.deltas():
                for delta in deltas:
                    choices.add(prompt_index, delta)
        finally:
            self.generation.close()
        best = choices.best(self.body.num_generated, self.body.n)
        return msgspec.json.encode(self._envelope(best, self.generation.usage()))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; an error on the way becomes an event too."""
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

    def _chunk(self, prompt_index: int, deltas: list[ChoiceDelta]) -> bytes:
        if len(deltas) == 1:
            return self._event(prompt_index, deltas[0])
        return b"".join([self._event(prompt_index, delta) for delta in deltas])

    def _event(self, prompt_index: int, delta: ChoiceDelta) -> bytes:
        """One delta's event; empty where there is nothing to say."""
        index = self._builder.index(prompt_index, delta)
        plain = self._plain_events.get(index)
        if plain is not None and delta.logprobs is None and delta.finish_reason is None:
            return plain.fill(delta.text) if delta.text else b""
        if plain is None and self._has_plain_events:
            data = self._encode_chunk(CompletionChoice(index, "", None, None))
            self._plain_events[index] = EventTemplate(data, "text")
        choice = self._builder.part(prompt_index, delta)
        return b"" if choice.says_nothing else event(self._encode_chunk(choice))

    def _encode_chunk(self, choice: CompletionChoice) -> bytes:
        if self._continuous_usage:
            return msgspec.json.encode(self._envelope([choice], self.generation.usage()))
        return msgspec.json.encode(self._envelope([choice], None if self._include_usage else msgspec.UNSET))

    def _envelope(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


def _prompts(body: CompletionRequest, tokens: Sequence[PromptTokens], tokenizer: Tokenizer, ready: EngineReady) -> list[Prompt]:
    """Each prompt with its sampling parameters, which differ in nothing but the limit and a seed that is drawn."""
    num_generated, structured = body.num_generated, body.structured_spec()
    asked_of_prompt = [body.logprobs if body.echo else None, body.prompt_logprobs]
    sampling: SamplingParams | None = None
    prompts = []
    for token_ids, text in tokens:
        kept = truncate_prompt(token_ids, body.truncate_prompt_tokens, body.max_tokens, DEFAULT_MAX_TOKENS, ready)
        limit = output_limit(len(kept), body.max_tokens, DEFAULT_MAX_TOKENS, ready, "max_tokens", "prompt")
        if sampling is None:
            sampling = body.sampling_params(
                ready,
                tokenizer,
                max_tokens=limit,
                n=num_generated,
                # The best are chosen by their logprobs, whether these are shown or not.
                logprobs=0 if body.logprobs is None and num_generated > body.n else body.logprobs,
                prompt_logprobs=max((number for number in asked_of_prompt if number is not None), default=None),
                structured=structured,
            )
        else:
            sampling = msgspec.structs.replace(sampling, max_tokens=limit, seed=body.draw_seed())
        prompts.append(Prompt(kept, text if len(kept) == len(token_ids) else None, sampling))
    return prompts
