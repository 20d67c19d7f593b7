"""POST /tokenize and /detokenize: a text or a conversation to the ids that the model would get, and back. Paths and fields are
vLLM's."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter
from pydantic import WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import InvalidRequest
from server.api.body import IGNORED_FIELDS_HEADER, RequestBody, read_json_object, validate
from server.api.chat_request import ChatRequest
from server.api.conversation import prompt_tokens
from server.api.sampling import Integer, check_vocabulary
from server.api.text_threads import in_thread_if_long
from server.disconnect import unless_disconnected
from server.state import ServerState

# What makes the prompt of a chat completion; checked as there.
_CHAT_FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
)
ChatField = Annotated[Any, WithJsonSchema({"description": "As of /v1/chat/completions. Not with prompt."})]


class TokenizeRequest(RequestBody):
    """Either prompt or messages. add_special_tokens: of a prompt; None means yes. A chat template writes its own."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    messages: ChatField = None
    tools: ChatField = None
    tool_choice: ChatField = None
    documents: ChatField = None
    chat_template: ChatField = None
    chat_template_kwargs: ChatField = None
    reasoning_effort: ChatField = None
    add_generation_prompt: ChatField = None
    continue_final_message: ChatField = None


class TokenizeAnswer(msgspec.Struct):
    """token_strs: how the vocabulary writes each token, where that was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: list[Integer]


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["tokenize"])

    @routes.post("/tokenize", openapi_extra={"x-request-type": TokenizeRequest.__name__})
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of a conversation in the model's chat template."""
        data = await read_json_object(request)
        body, headers = validate(TokenizeRequest, data, strict=state.config.strict)
        state.resolve_model(body.model)
        ready = state.require_ready()
        if body.messages is not None:
            token_ids, more = await unless_disconnected(request.receive, _tokenize_chat(state, body, data))
            headers = _joined(headers, more)
        else:
            token_ids = await unless_disconnected(request.receive, _tokenize_prompt(state, body, data))
        texts = None
        if body.return_token_strs:
            write = state.client.tokenizer.vocabulary_text
            texts = await in_thread_if_long(len(token_ids), lambda: list(map(write, token_ids)))
        answer = TokenizeAnswer(len(token_ids), ready.max_model_len, token_ids, texts)
        return Response(msgspec.json.encode(answer), headers=headers, media_type="application/json")

    @routes.post("/detokenize", openapi_extra={"x-request-type": DetokenizeRequest.__name__})
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        body, headers = validate(DetokenizeRequest, await read_json_object(request), strict=state.config.strict)
        state.resolve_model(body.model)
        check_vocabulary(body.tokens, state.require_ready().vocab_size, "tokens")
        decode = partial(state.client.tokenizer.decode, body.tokens, skip_special_tokens=False)
        text = await in_thread_if_long(len(body.tokens), decode)
        return Response(msgspec.json.encode(DetokenizeAnswer(text)), headers=headers, media_type="application/json")

    return routes


async def _tokenize_chat(state: ServerState, body: TokenizeRequest, data: dict[str, Any]) -> tuple[list[int], dict[str, str]]:
    """The ids that a chat completion of these fields would begin with; and the header of those that change nothing."""
    if body.prompt is not None:
        raise InvalidRequest("prompt and messages exclude each other: give one.", param="prompt")
    if body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens goes with prompt: of messages, the chat template writes the special tokens.",
            param="add_special_tokens",
        )
    fields = {name: data[name] for name in _CHAT_FIELDS if name in data}
    chat, headers = validate(ChatRequest, fields, strict=state.config.strict)
    return await prompt_tokens(state, chat.conversation()), headers


async def _tokenize_prompt(state: ServerState, body: TokenizeRequest, data: dict[str, Any]) -> list[int]:
    if body.prompt is None:
        raise InvalidRequest("Give a prompt or messages.", param="prompt", code="missing_required_parameter")
    if stray := [name for name in _CHAT_FIELDS if name in data]:
        raise InvalidRequest(f"{stray[0]} goes with messages, not with a prompt.", param=stray[0])
    tokenizer = state.client.tokenizer
    encode = partial(tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return await in_thread_if_long(len(body.prompt), encode)


def _joined(headers: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    lists = [found[IGNORED_FIELDS_HEADER] for found in (headers, more) if found]
    return {IGNORED_FIELDS_HEADER: ", ".join(lists)} if lists else {}
