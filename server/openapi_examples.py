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
    "getHealth": {"status": "ready", "detail": "The model is ready.", "progress": None},
    "getVersion": {"version": "0.1.0"},
}


def _stream(head: dict[str, Any], choices: list[dict[str, Any]]) -> str:
    """Chunks that differ in their only choice, as they go over the wire."""
    chunks = [{**head, "created": 1790000000, "model": _MODEL, "choices": [{"index": 0, **choice}]} for choice in choices]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


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
}
