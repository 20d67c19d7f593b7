"""The OpenAPI document: what every endpoint takes and gives, put together from the types that the code itself uses.

Bodies are read by server.api.body and answers written by msgspec, so FastAPI knows only paths; the table below knows the rest,
and a test holds it against the routes. Version 3.2, the first that can say what the events of a stream are (`itemSchema`):
https://spec.openapis.org/oas/v3.2.0.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from engine.sampling_params import MAX_SEED
from server.api.body import IGNORED_FIELDS_HEADER
from server.api.chat_request import ChatRequest
from server.api.chat_types import ChatChunk, ChatCompletion
from server.api.completions import Completion, CompletionRequest
from server.api.embeddings import EmbeddingList, EmbeddingRequest
from server.api.health import Health, Version
from server.api.models import ModelCard, ModelList
from server.api.responses import InputTokens
from server.api.responses_request import ResponseRequest
from server.api.responses_types import DeletedResponse, Event, ItemList, ResponseObject
from server.api.time_limits import FIRST_TOKEN_TIMEOUT_HEADER, MAX_TIMEOUT_S, TIMEOUT_HEADER, TimeLimits
from server.api.tokenize import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from server.openapi_examples import ANSWERS, REQUESTS, STREAMS
from server.openapi_fields import FIELDS, TYPES
from server.request_log import REQUEST_ID_HEADER

OPENAPI_VERSION = "3.2.0"
DESCRIPTION = """\
An OpenAI-compatible model server. A field that is `null` is a field not given. Fields nobody knows are refused with `--strict`,
and otherwise listed in the response header `X-Octavo-Ignored-Fields`, as are those accepted without effect. Streams are
server-sent events whose `data` is JSON."""

_REF = "#/components/schemas/{}"
_NULL = {"type": "null"}
_DONE = "[DONE]"
ERROR = "Error"
_ERROR_SCHEMA = {
    "type": "object",
    "description": "OpenAI's error object, of every status from 400 on.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "What is wrong and what is allowed, for people."},
                "type": {"type": "string", "description": "The kind of error."},
                "param": {"type": ["string", "null"], "description": "The field of the request that is wrong."},
                "code": {"type": ["string", "null"], "description": "The error's name, for programs."},
            },
        }
    },
    "example": {
        "error": {
            "message": "temperature must be between 0.0 and 2.0, got 9.0",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        }
    },
}
_READS = (400, 401, 403, 404, 413, 429, 503)
_GENERATES = (400, 401, 403, 404, 413, 429, 500, 503, 504)


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    answer: the struct of status 200, the media type of one that is no JSON, or None where there is never a 200. events: the
    structs of a stream's events, which ends with `[DONE]` where `done`. errors: statuses that have an Error. also: statuses
    that have the answer's body too.
    """

    id: str
    summary: str
    answer: type[msgspec.Struct] | str | None
    request: type[BaseModel] | None = None
    events: tuple[type[msgspec.Struct], ...] = ()
    done: bool = True
    errors: tuple[int, ...] = (401, 403)
    also: tuple[int, ...] = ()
    needs_key: bool = True


OPERATIONS: dict[str, Operation] = {
    "POST /v1/completions": Operation(
        "createCompletion", "Continue prompts", Completion, CompletionRequest, (Completion,), errors=_GENERATES
    ),
    "POST /v1/chat/completions": Operation(
        "createChatCompletion", "Answer a conversation", ChatCompletion, ChatRequest, (ChatChunk,), errors=_GENERATES
    ),
    "POST /v1/responses": Operation(
        "createResponse",
        "Answer input items",
        ResponseObject,
        ResponseRequest,
        get_args(Event),
        done=False,
        errors=_GENERATES,
    ),
    "POST /v1/responses/input_tokens": Operation(
        "countResponseInputTokens",
        "Count the tokens of input items",
        InputTokens,
        ResponseRequest,
        errors=_READS,
    ),
    "GET /v1/responses/{response_id}": Operation(
        "getResponse", "Look a stored response up", ResponseObject, errors=(400, 401, 403, 404)
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        "deleteResponse", "Forget a stored response", DeletedResponse, errors=(401, 403, 404)
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        "cancelResponse", "Refused: no response runs in the background", None, errors=(400, 401, 403, 404)
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        "listInputItems", "List what a stored response was made from", ItemList, errors=(400, 401, 403, 404)
    ),
    "POST /v1/embeddings": Operation("createEmbedding", "Vectors of texts", EmbeddingList, EmbeddingRequest, errors=_GENERATES),
    "POST /tokenize": Operation("tokenize", "Texts to token ids", TokenizeAnswer, TokenizeRequest, errors=_READS),
    "POST /detokenize": Operation("detokenize", "Token ids to text", DetokenizeAnswer, DetokenizeRequest, errors=_READS),
    "GET /v1/models": Operation("listModels", "List the served names", ModelList),
    "GET /v1/models/{name}": Operation("retrieveModel", "Look a name up", ModelCard, errors=(401, 403, 404)),
    "GET /health": Operation("getHealth", "Whether requests are taken", Health, errors=(), also=(503,), needs_key=False),
    "GET /health/ready": Operation(
        "getReadiness", "Whether the engine completes steps: the same", Health, errors=(), also=(503,), needs_key=False
    ),
    "GET /health/live": Operation(
        "getLiveness", "Whether this server needs no restart from outside", Health, errors=(), also=(503,), needs_key=False
    ),
    "GET /version": Operation("getVersion", "Octavo's version", Version),
    "GET /metrics": Operation("getMetrics", "Prometheus metrics", "text/plain"),
}

_STATUS_TEXT = {
    400: "The request is wrong: `param` names the field, `message` says what was got and what is allowed.",
    401: "No API key, or a wrong one.",
    403: "The API key's scopes do not cover this, or a page of an origin that is not let in has sent it.",
    404: "What the request names is not here: a model, a response, a path.",
    413: "The body is larger than this server reads.",
    429: "As much is open, or waits, as the server takes; Retry-After says when to come again.",
    500: "The server met an internal error, or the request failed in the engine.",
    503: "The model is still being loaded, or the engine is down; Retry-After says when to come again.",
    504: "The request's time limit passed before its first token.",
}
_STATUS_HEADERS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
_HEADERS = {
    REQUEST_ID_HEADER: "The id given in the request's header of this name, else one made here.",
    IGNORED_FIELDS_HEADER: "Fields of the request that had no effect, with commas between; absent where all had.",
    "Retry-After": "Seconds to wait.",
    "WWW-Authenticate": "How to authenticate: Bearer.",
}

_RESPONSE_LINKS = {
    name: {"operationId": name, "parameters": {"response_id": "$response.body#/id"}}
    for name in ("getResponse", "deleteResponse", "cancelResponse", "listInputItems")
}
_PARAMETERS: dict[str, dict[str, Any]] = {
    REQUEST_ID_HEADER: {
        "description": "An id for the header of this name: up to 128 of A-Z, a-z, 0-9 and ._:-; any other is replaced.",
        "schema": {"type": "string"},
    },
    TIMEOUT_HEADER: {
        "description": "`timeout`, for clients that cannot add fields; the field is stronger.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
    },
    FIRST_TOKEN_TIMEOUT_HEADER: {
        "description": "`first_token_timeout`, likewise.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S},
    },
}


def build(app: FastAPI, *, needs_keys: bool) -> dict[str, Any]:
    """The document of an application's routes. needs_keys: whether requests have to bring an API key."""
    paths = get_openapi(title=app.title, version=app.version, routes=app.routes)["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            _complete(operation, OPERATIONS[f"{method.upper()} {path}"])
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": app.title, "version": app.version, "description": DESCRIPTION},
        "security": [{"bearer": []}] if needs_keys else [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas(OPERATIONS.values()),
            "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()},
            "parameters": {name: {"name": name, "in": "header", **parameter} for name, parameter in _PARAMETERS.items()},
            "responses": {str(status): _error(status) for status in _STATUS_TEXT},
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of the server's API keys, with scope api; for /metrics with scope metrics.",
                }
            },
        },
    }


def _complete(operation: dict[str, Any], known: Operation) -> None:
    """What FastAPI could not know about one operation, in place."""
    operation.pop("x-request-type", None)
    operation.update(operationId=known.id, summary=known.summary)
    headers = [REQUEST_ID_HEADER]
    if 504 in known.errors and known.request is not None:
        headers += [TIMEOUT_HEADER, *([FIRST_TOKEN_TIMEOUT_HEADER] if issubclass(known.request, TimeLimits) else [])]
    operation.setdefault("parameters", []).extend({"$ref": f"#/components/parameters/{name}"} for name in headers)
    if not known.needs_key:
        operation["security"] = []
    if known.request is not None:
        schema = {"$ref": _REF.format(known.request.__name__)}
        examples = {name: {"value": body} for name, body in REQUESTS[known.id].items()}
        content = {"application/json": {"schema": schema, "examples": examples}}
        operation["requestBody"] = {"required": True, "content": content}
    good = _answer(known)
    operation["responses"] = {
        **({} if known.answer is None else {"200": {"description": "The answer.", **good}}),
        **{str(status): {"description": _STATUS_TEXT[status], **good} for status in known.also},
        **{str(status): {"$ref": f"#/components/responses/{status}"} for status in known.errors},
    }
    if known.answer is ResponseObject and known.request is not None:
        operation["responses"]["200"]["links"] = _RESPONSE_LINKS


def _answer(known: Operation) -> dict[str, Any]:
    names = (REQUEST_ID_HEADER, IGNORED_FIELDS_HEADER) if known.request else (REQUEST_ID_HEADER,)
    content: dict[str, Any] = {}
    if isinstance(known.answer, str):
        content = {known.answer: {"schema": {"type": "string"}}}
    elif known.answer is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(known.answer.__name__)}, **_example(known.id)}}
    if known.events:
        content["text/event-stream"] = _stream(known)
    return {"headers": _headers(names), "content": content}


def _example(operation_id: str) -> dict[str, Any]:
    return {"example": ANSWERS[operation_id]} if operation_id in ANSWERS else {}


def _stream(known: Operation) -> dict[str, Any]:
    """Each event's schema, in the way of FastAPI's own streams, and a whole stream as an example."""
    kinds = [{"$ref": _REF.format(cls.__name__)} for cls in known.events]
    if known.done:  # the others have an event for errors of their own
        kinds.append({"$ref": _REF.format(ERROR)})
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    properties: dict[str, Any] = {"data": {"anyOf": [{"const": _DONE}, data]} if known.done else data}
    if not known.done:
        properties["event"] = {"type": "string", "description": "The same as `type` in the data."}
    item = {"type": "object", "required": ["data"], "properties": properties}
    return {"itemSchema": item, "examples": {"stream": {"serializedValue": STREAMS[known.id]}}}


def _headers(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _error(status: int) -> dict[str, Any]:
    return {
        "description": _STATUS_TEXT[status],
        "headers": _headers((REQUEST_ID_HEADER, *_STATUS_HEADERS.get(status, ()))),
        "content": {"application/json": {"schema": {"$ref": _REF.format(ERROR)}}},
    }


def schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    """Name -> JSON schema of every type that the operations name, and of the types in those."""
    known = list(operations)
    structs = {cls for operation in known for cls in (operation.answer, *operation.events) if isinstance(cls, type)}
    _, found = msgspec.json.schema_components(sorted(structs, key=lambda cls: cls.__name__), ref_template=_REF.format("{name}"))
    for request in {operation.request for operation in known if operation.request is not None}:
        definition = request.model_json_schema(ref_template=_REF.format("{model}"))
        for name, schema in [*definition.pop("$defs", {}).items(), (request.__name__, definition)]:
            described = _describe(name, schema)
            assert found.setdefault(name, described) == described, f"two types are named {name}"
    return {ERROR: _ERROR_SCHEMA, **dict(sorted(found.items()))}


def _describe(type_name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A request type's schema with descriptions, ranges as the code checks them, and null for what may be left out."""
    plain: dict[str, Any] = _plain(schema)
    required = schema.get("required", ())
    for name, given in plain.get("properties", {}).items():
        words = {} if "description" in given else FIELDS.get(f"{type_name}.{name}", FIELDS.get(name, {}))
        plain["properties"][name] = _property(given, words, optional=name not in required)
    return plain | TYPES.get(type_name, {})


def _plain(schema: Any) -> Any:
    """Without pydantic's titles, which say nothing, and without the bounds that are those of the machine's integers."""
    if isinstance(schema, list):
        return [_plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _plain(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if kept.get("minimum") == -(2**63) and kept.get("maximum") == MAX_SEED:
        del kept["minimum"], kept["maximum"]
    return kept


def _property(given: dict[str, Any], words: Mapping[str, Any], *, optional: bool) -> dict[str, Any]:
    schema = {key: value for key, value in given.items() if (key, value) != ("default", None)}
    branches = [branch for branch in schema.pop("anyOf", ()) if branch != _NULL]
    schema |= branches[0] if len(branches) == 1 else {"anyOf": branches} if branches else {}
    schema |= words
    if not optional:
        return schema
    if "anyOf" in schema:
        schema["anyOf"] = [*schema["anyOf"], _NULL]
    elif schema.keys() & {"enum", "const", "$ref"}:
        inner = {key: schema.pop(key) for key in ("enum", "const", "$ref", "type") if key in schema}
        schema["anyOf"] = [inner, _NULL]
    elif isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema
