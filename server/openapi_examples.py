"""The OpenAPI document's examples, by operation: requests, answers, and whole streams. The requests are sent by a test."""

from __future__ import annotations

import json
from typing import Any

_MODEL = "SmolLM2-135M-Instruct"
_USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 0}}
_QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
_WEATHER = {
    "name": "get_weather",
    "description": "The weather of a place, now.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

REQUESTS: dict[str, dict[str, Any]] = {
    "createCompletion": {
        "one prompt": {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0},
        "two prompts, streamed": {
            "prompt": ["One, two,", "Red, green,"],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "logprobs of a text": {"prompt": "The sky is blue", "max_tokens": 0, "echo": True, "logprobs": 1},
    },
    "createChatCompletion": {
        "a question": {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_completion_tokens": 20,
        },
        "streamed": {
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "max_completion_tokens": 20,
            "stream": True,
        },
        "a function to call": {
            "messages": _QUESTION,
            "tools": [{"type": "function", "function": _WEATHER}],
            "tool_choice": "auto",
            "max_completion_tokens": 20,
        },
        "an answer that follows a schema": {
            "messages": [{"role": "user", "content": "Invent a person."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": _PERSON}},
            "max_completion_tokens": 20,
        },
    },
    "createResponse": {
        "a question": {"input": "What is the capital of France?", "max_output_tokens": 20},
        "streamed": {"input": "Tell me a story.", "instructions": "Be brief.", "max_output_tokens": 20, "stream": True},
        "a function to call": {"input": _QUESTION, "tools": [{"type": "function", **_WEATHER}], "max_output_tokens": 20},
        "an answer that follows a schema": {
            "input": "Invent a person.",
            "text": {"format": {"type": "json_schema", "name": "person", "strict": True, "schema": _PERSON}},
            "max_output_tokens": 20,
        },
    },
    "countResponseInputTokens": {"a question": {"input": "What is the capital of France?"}},
    "createEmbedding": {
        "two texts": {"input": ["a cat", "the stock market"]},
        "fewer dimensions, as base64": {"input": "a cat", "dimensions": 4, "encoding_format": "base64"},
    },
    "tokenize": {
        "a text": {"prompt": "The sky is blue", "return_token_strs": True},
        "a conversation": {"messages": [{"role": "user", "content": "Hi"}]},
    },
    "detokenize": {"token ids": {"tokens": [45, 2, 46]}},
}

ANSWERS: dict[str, Any] = {
    "createCompletion": {
        "id": "cmpl-3f1c",
        "object": "text_completion",
        "created": 1790000000,
        "model": _MODEL,
        "choices": [{"index": 0, "text": " Paris, a", "logprobs": None, "finish_reason": "length"}],
        "usage": _USAGE,
    },
    "createChatCompletion": {
        "id": "chatcmpl-3f1c",
        "object": "chat.completion",
        "created": 1790000000,
        "model": _MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {**_USAGE, "prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45},
    },
    "listModels": {
        "object": "list",
        "data": [
            {
                "id": _MODEL,
                "object": "model",
                "created": 1790000000,
                "owned_by": "octavo",
                "root": "demo",
                "parent": None,
                "max_model_len": 8192,
            }
        ],
    },
    "countResponseInputTokens": {"object": "response.input_tokens", "input_tokens": 37},
    "deleteResponse": {"id": "resp_3f1c", "object": "response", "deleted": True},
    "createEmbedding": {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
        "model": _MODEL,
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    },
    "tokenize": {"count": 2, "max_model_len": 8192, "tokens": [504, 6376], "token_strs": ["The", "Ġsky"]},
    "detokenize": {"prompt": "The sky"},
    "getHealth": {"status": "ready", "detail": "The model is ready.", "progress": None},
    "getVersion": {"version": "0.1.0"},
}


def _stream(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    """Chunks that differ in their only choice, as they go over the wire."""
    chunks = [{**head, "created": 1790000000, "model": _MODEL, "choices": [{"index": 0, **choice}]} for choice in choices]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


_AT = {"item_id": "msg_3f1c", "output_index": 0, "content_index": 0}
_RESPONSE_EVENTS: list[dict[str, Any]] = [
    {"type": "response.output_text.delta", **_AT, "delta": "Paris", "logprobs": []},
    {"type": "response.output_text.delta", **_AT, "delta": ".", "logprobs": []},
    {"type": "response.output_text.done", **_AT, "text": "Paris.", "logprobs": []},
]


STREAMS: dict[str, str] = {
    "createCompletion": _stream(
        {"id": "cmpl-3f1c", "object": "text_completion"},
        [
            {"text": " Paris", "logprobs": None, "finish_reason": None},
            {"text": ".", "logprobs": None, "finish_reason": "stop"},
        ],
    ),
    "createChatCompletion": _stream(
        {"id": "chatcmpl-3f1c", "object": "chat.completion.chunk"},
        [
            {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None},
            {"delta": {"content": "Paris."}, "logprobs": None, "finish_reason": None},
            {"delta": {}, "logprobs": None, "finish_reason": "stop"},
        ],
    ),
    "createResponse": "".join(
        f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n"
        for number, event in enumerate(_RESPONSE_EVENTS)
    ),
}
