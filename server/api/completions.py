"""POST /v1/completions: text or token ids in, text out; one or many prompts, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import msgspec
from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.client import ChoiceDelta
from engine.errors import InvalidRequest
from engine.messages import EngineReady, TokenLogprobs
from engine.sampling_params import MAX_LOGPROBS
from engine.tokenizer import Tokenizer
from server.api.body import json_type, read_json_object, validate
from server.api.generation import Generation, Prompt, Usage, in_thread_if_long
from server.api.logprobs import LegacyLogprobs, LegacyLogprobsBuilder
from server.api.sampling import GenerationRequest, Integer, answer_id, check_vocabulary, output_limit
from server.disconnect import unless_disconnected
from server.errors import error_event_body
from server.sse import DONE, EventStream, EventTemplate, event
from server.state import ServerState

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


class CompletionRequest(GenerationRequest):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.UNSUPPORTED,
        "suffix": ("",),
        "best_of": (1,),
    }

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool = False
    logprobs: Integer | None = None
    add_special_tokens: bool = True


class CompletionChoice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


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
        answer = await _Answer.start(state, request, body, arrival)
        if body.stream:
            return EventStream(answer, headers=headers)
        content = await unless_disconnected(request.receive, answer.whole())
        return Response(content, headers=headers, media_type="application/json")

    return routes


async def _tokenize(body: CompletionRequest, tokenizer: Tokenizer, ready: EngineReady) -> list[tuple[list[int], str | None]]:
    """(ids, text or None) of every prompt. Raises InvalidRequest."""
    given = body.prompt
    single = isinstance(given, str) or (isinstance(given, list) and bool(given) and not isinstance(given[0], str | list))
    prompts = [given] if single else given
    if not isinstance(prompts, list) or not prompts:
        got = "an empty array" if prompts == [] else json_type(given)
        raise InvalidRequest(f"prompt must be a string, token ids, or an array of either, got {got}.", param="prompt")
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}.", param="prompt")
    result: list[tuple[list[int], str | None]] = []
    for index, prompt in enumerate(prompts):
        name = "prompt" if single else f"prompt[{index}]"
        if type(prompt) is not type(prompts[0]):
            raise InvalidRequest(f"{name} is {json_type(prompt)}, prompt[0] {json_type(prompts[0])}: use one.", param="prompt")
        if isinstance(prompt, str):
            encode = partial(tokenizer.encode, prompt, add_special_tokens=body.add_special_tokens)
            token_ids = await in_thread_if_long(len(prompt), encode) if prompt else []
            text: str | None = prompt
        else:
            token_ids, text = _check_token_ids(prompt, name), None
        if not token_ids:
            raise InvalidRequest(f"{name} is empty; give at least one token.", param="prompt", code="empty_prompt")
        check_vocabulary(token_ids, ready.vocab_size, "prompt")
        result.append((token_ids, text))
    return result


def _check_token_ids(prompt: object, name: str) -> list[int]:
    if not isinstance(prompt, list):
        raise InvalidRequest(f"{name} must be a string or an array of token ids, got {json_type(prompt)}.", param="prompt")
    wrong = [item for item in prompt if type(item) is not int]
    if wrong:
        raise InvalidRequest(f"{name} must hold integers only, got {json_type(wrong[0])} among them.", param="prompt")
    return prompt


class _Answer:
    """One request on its way to being answered. A choice's index counts prompts first: prompt × n + choice."""

    def __init__(self, body: CompletionRequest, model: str, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        self.body = body
        self._id = answer_id("cmpl", body.request_id)
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._include_usage = body.include_usage
        self._plain_events: dict[int, EventTemplate] = {}
        self._logprobs: dict[int, LegacyLogprobsBuilder] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self.generation: Generation

    @classmethod
    async def start(cls, state: ServerState, request: Request, body: CompletionRequest, arrival: float) -> _Answer:
        """Everything that can be refused is refused here, before there is a response. Raises OctavoError."""
        model = state.resolve_model(body.model)
        ready = state.require_ready()
        if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs must be between 0 and {MAX_LOGPROBS}, got {body.logprobs}.", param="logprobs")
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens may be 0 only with echo: true.", param="max_tokens")
        tokenizer = state.client.tokenizer
        prompts = []
        for token_ids, text in await _tokenize(body, tokenizer, ready):
            limit = output_limit(len(token_ids), body.max_tokens, DEFAULT_MAX_TOKENS, ready, "max_tokens")
            sampling = body.sampling_params(
                ready,
                tokenizer,
                max_tokens=limit,
                n=body.n,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
            prompts.append(Prompt(token_ids, text, sampling))
        answer = cls(body, model, tokenizer, prompts)
        start = Generation.start(state, answer._id, prompts, body, arrival)
        answer.generation = await unless_disconnected(request.receive, start)
        return answer

    async def whole(self) -> bytes:
        """The answer to a request that does not stream."""
        choices: dict[int, CompletionChoice] = {}
        pieces: dict[int, list[str]] = {}
        try:
            async for prompt_index, deltas in self.generation.deltas():
                for delta in deltas:
                    part = self._choice(prompt_index, delta)
                    pieces.setdefault(part.index, []).append(part.text)
                    choice = choices.setdefault(part.index, part)
                    choice.finish_reason, choice.stop_reason = part.finish_reason, part.stop_reason
                    if choice is not part and choice.logprobs is not None and part.logprobs is not None:
                        choice.logprobs.extend(part.logprobs)
        finally:
            self.generation.close()
        for index, choice in choices.items():
            choice.text = "".join(pieces[index])
        ordered = [choices[index] for index in sorted(choices)]
        return msgspec.json.encode(self._envelope(ordered, self.generation.usage()))

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
        index = prompt_index * self.body.n + delta.choice_index
        plain = self._plain_events.get(index)
        if plain is not None and delta.logprobs is None and delta.finish_reason is None:
            return plain.fill(delta.text) if delta.text else b""
        if plain is None:
            data = self._encode_chunk(CompletionChoice(index, "", None, None))
            self._plain_events[index] = EventTemplate(data, "text")
        choice = self._choice(prompt_index, delta)
        if not choice.text and choice.logprobs is None and choice.finish_reason is None:
            return b""
        return event(self._encode_chunk(choice))

    def _encode_chunk(self, choice: CompletionChoice) -> bytes:
        return msgspec.json.encode(self._envelope([choice], None if self._include_usage else msgspec.UNSET))

    def _envelope(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, prompt_index: int, delta: ChoiceDelta) -> CompletionChoice:
        index = prompt_index * self.body.n + delta.choice_index
        text, logprobs = delta.text, None
        builder = self._logprobs.get(index)
        if builder is None:  # the choice's first event
            builder = self._logprobs[index] = LegacyLogprobsBuilder(self._tokenizer)
            if self.body.echo:
                prompt = self._prompts[prompt_index]
                text = self._prompt_text(prompt) + text
                # The engine sends them once, with the first choice's first event; all choices echo the same.
                if delta.prompt_logprobs is not None:
                    self._prompt_logprobs[prompt_index] = delta.prompt_logprobs
                if prompt_index in self._prompt_logprobs:
                    logprobs = builder.build(prompt.token_ids, self._prompt_logprobs[prompt_index])
        if delta.logprobs is not None:
            own = builder.build(delta.token_ids, delta.logprobs)
            logprobs = own if logprobs is None else logprobs.extend(own)
        return CompletionChoice(index, text, logprobs, delta.finish_reason, delta.stop_reason)

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self.body.skip_special_tokens)
