"""docs/api.md against OpenAI's types, against our request types, and against what the server does."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from pydantic import BaseModel

from engine.client import EngineClient
from server.app import create_app
from server.config import ServerConfig
from server.errors import _TABLE, status_and_type
from server.limits import _REFUSALS
from server.parsers.base import FunctionTool
from server.parsers.hermes import default_tool_block
from server.parsers.registry import REASONING_FORMATS, TOOL_FORMATS
from tests.api_fields import (
    DOCS,
    REQUESTS,
    SPECIFICATION,
    Row,
    documented,
    documented_kinds,
    our_fields,
    quoted,
    specified_fields,
    specified_kinds,
    tables,
)
from tests.server.fake_client import FakeEngineClient, byte_tokenizer

ROOT = Path(__file__).parent.parent
ROWS = documented()
KINDS = documented_kinds()
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
    "embeddings": "/v1/embeddings",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": [{"type": "text", "text": "a"}]}
# The smallest request of each endpoint, and what stands around a field for it to be read at all, by the path's beginning.
SMALLEST: dict[str, dict[str, Any]] = {
    "completions": {"prompt": "a", "max_tokens": 4},
    "chat": {"messages": [USER]},
    "responses": {"input": "a"},
    "embeddings": {"input": "a"},
    "tokenize": {"prompt": "a"},
    "detokenize": {"tokens": [65]},
}
ASSISTANT = {"messages": [{"role": "assistant", "content": "a"}, USER]}
CALLED = [
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "a"}]},
]
MESSAGE = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}]
AROUND: dict[tuple[str, str], dict[str, Any]] = {
    ("chat", "messages[].tool_calls"): {"messages": [{"role": "assistant", "tool_calls": [CALL]}, USER]},
    ("chat", "messages[].audio"): ASSISTANT,
    ("chat", "messages[].function_call"): ASSISTANT,
    ("chat", "messages[].annotations"): ASSISTANT,
    ("chat", "tools[]"): {"tools": [{"type": "function", "function": FUNCTION}]},
    ("responses", "tools[]"): {"tools": [{"type": "function", **FUNCTION}]},
    ("responses", "text.format"): {"text": {"format": {"type": "json_object"}}},
    ("responses", "input[]"): {"input": MESSAGE},
    ("responses", "input[].output[]"): {"input": CALLED},
    ("responses", "input[].async"): {"input": CALLED},
    ("responses", "input[].caller"): {"input": CALLED},
    ("responses", "input[].namespace"): {"input": CALLED},
    ("responses", "input[].summary"): {"input": [{"type": "reasoning", "content": []}, *MESSAGE]},
    ("responses", "input[].encrypted_content"): {"input": [{"type": "reasoning", "content": []}, *MESSAGE]},
}
FOR_ALL: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True, "stream_options": {}},
    "structured_outputs": {"structured_outputs": {"choice": ["a"]}},
    "response_format.json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
}
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls }};{% endfor %}{{ tools and 'tools' }}"


def cases(status: str) -> list[tuple[str, str]]:
    return [key for key, row in ROWS.items() if row.status == status]


def around(endpoint: str, path: str) -> dict[str, Any]:
    """A request in which a field of this path could stand."""
    body = json.loads(json.dumps(SMALLEST[endpoint]))
    for begin, more in FOR_ALL.items():
        if path.startswith(begin):
            done = {name: value for name, value in more.items() if ROWS.get((endpoint, name), Row("")).status == "done"}
            body |= json.loads(json.dumps(done))
    matching = [begin for where, begin in AROUND if where == endpoint and path.startswith(begin)]
    return body | json.loads(json.dumps(AROUND[endpoint, max(matching, key=len)])) if matching else body


def put(body: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The body with the value at this path; of a list, in the first object that goes on so, else in the first."""
    names = path.split(".")
    place: Any = body
    for parent, following in pairwise(names):
        place = place.setdefault(parent.removesuffix("[]"), [{}] if parent.endswith("[]") else {})
        if isinstance(place, list):
            place = next((item for item in place if following.removesuffix("[]") in item), place[0])
    place[names[-1]] = value
    return body


@cache
def application(strict: bool) -> FastAPI:
    client = FakeEngineClient()
    client.tokenizer = byte_tokenizer(TEMPLATE)
    assert client.ready is not None
    client.ready = msgspec.structs.replace(client.ready, max_model_len=4096)
    return create_app(cast(EngineClient, client), ServerConfig(model="tiny", strict=strict))


def ask(endpoint: str, body: dict[str, Any], *, strict: bool = False) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=application(strict), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(PATHS[endpoint], json=body)

    return asyncio.run(send())


def try_value(endpoint: str, path: str, value: object, *, strict: bool = False) -> httpx.Response:
    return ask(endpoint, put(around(endpoint, path), path, value), strict=strict)


def param_of(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return re.sub(r"\[\d+\]", "[]", str(response.json()["error"]["param"]))


# The lists of fields agree.


@pytest.mark.parametrize("endpoint", SPECIFICATION)
def test_every_field_of_the_specification_is_there(endpoint: str) -> None:
    missing = specified_fields(endpoint, ROWS, KINDS) - {path for where, path in ROWS if where == endpoint}
    assert not missing, f"docs/api.md says nothing of {sorted(missing)} of {endpoint}"


def test_the_reader_of_the_specification_sees_deep_enough() -> None:
    assert {"audio", "web_search_options", "messages[].tool_calls[].function.arguments"} <= specified_fields(
        "chat", ROWS, KINDS
    )
    assert {"input[].call_id", "text.format.schema", "tools[].strict"} <= specified_fields("responses", ROWS, KINDS)
    assert {"prompt", "stream_options.include_usage"} <= specified_fields("completions", ROWS, KINDS)
    assert specified_fields("embeddings", ROWS, KINDS) == {"input", "model", "dimensions", "encoding_format", "user"}


@pytest.mark.parametrize("endpoint", SPECIFICATION)
def test_every_kind_of_the_specification_is_taken_or_refused(endpoint: str) -> None:
    found = specified_kinds(endpoint, ROWS, KINDS)
    assert endpoint not in ("chat", "responses") or len(found) > 4
    for path, values in found.items():
        kind = KINDS.get((endpoint, path))
        assert kind is not None, f"docs/api.md says nothing of the kinds {path} of {endpoint}: {sorted(values)}"
        assert kind.refused is None or values <= kind.taken | kind.refused, (path, sorted(values))


@pytest.mark.parametrize("endpoint", REQUESTS)
def test_every_field_of_ours_is_there_and_no_other(endpoint: str) -> None:
    ours, told = our_fields(endpoint), {path: row.status for (where, path), row in ROWS.items() if where == endpoint}
    assert not (missing := sorted(ours.keys() - told.keys())), f"docs/api.md says nothing of {missing} of {endpoint}"
    unknown = sorted(told.keys() - ours.keys() - specified_fields(endpoint, ROWS, KINDS))
    assert not unknown, f"nobody knows {unknown} of {endpoint}"
    assert {path: told[path] for path in ours} == ours


def test_a_status_is_one_of_three() -> None:
    assert {row.status for row in ROWS.values()} == {"done", "no effect", "refused"}


# What is said is what happens.


@pytest.mark.parametrize(("endpoint", "path"), cases("no effect"))
def test_without_effect(endpoint: str, path: str) -> None:
    for strict in (False, True):
        response = try_value(endpoint, path, _some_value(path), strict=strict)
        assert response.status_code == 200, response.text
        listed = re.sub(r"\[\d+\]", "[]", response.headers.get("X-Octavo-Ignored-Fields", "")).split(", ")
        assert path in listed


@pytest.mark.parametrize(("endpoint", "path"), cases("refused"))
def test_refused(endpoint: str, path: str) -> None:
    response = try_value(endpoint, path, {"x": ["y"]})
    assert param_of(response) == path and response.json()["error"]["code"] == "unsupported_parameter"
    for accepted in quoted(ROWS[endpoint, path].accepted):
        response = try_value(endpoint, path, json.loads(accepted))
        assert response.status_code == 200, response.text


def _some_value(path: str) -> Any:
    """Of the type that the specification wants, where that is looked at."""
    texts = ("phase", "encrypted_content", "description", "caller", "namespace")
    return (
        "a" if path.endswith(texts) else {"a": "b"} if path.endswith(("metadata", "schema")) else [] if "summary" in path else 1
    )


def _numeric(row: Row) -> tuple[list[float], list[float]] | None:
    """(values in the range, values outside), where the range begins with numbers."""
    if found := re.match(r"`(-?[\d.]+)` to `(-?[\d.]+)`$", row.range):
        low, high = float(found[1]), float(found[2])
        return [low, high], [low - 1, high + 1]
    if found := re.match(r"above `(-?[\d.]+)`, at most `(-?[\d.]+)`$", row.range):
        return [float(found[2])], [float(found[1]), float(found[2]) + 1]
    if found := re.match(r"at least `(\d+)`", row.range):
        return [float(found[1])], [float(found[1]) - 1]
    return None


RANGES = [key for key in cases("done") if _numeric(ROWS[key])]


def test_there_are_ranges_to_try() -> None:
    assert len(RANGES) > 30
    assert {path for _, path in RANGES} >= {"temperature", "top_p", "n", "logprobs", "truncate_prompt_tokens", "top_k"}


@pytest.mark.parametrize(("endpoint", "path"), RANGES)
def test_ranges(endpoint: str, path: str) -> None:
    allowed, refused = _numeric(ROWS[endpoint, path]) or ([], [])
    for value in allowed:
        response = try_value(endpoint, path, _as_number(value))
        assert response.status_code == 200, response.text
    for value in refused:
        assert param_of(try_value(endpoint, path, _as_number(value))) == path


def _as_number(value: float) -> float:
    return int(value) if value == int(value) else value


VALUES = [key for key in cases("done") if re.fullmatch(r"`[^`]+`(, `[^`]+`)+", ROWS[key].range)]


@pytest.mark.parametrize(("endpoint", "path"), VALUES)
def test_values(endpoint: str, path: str) -> None:
    texts = quoted(ROWS[endpoint, path].range)
    values = [json.loads(text) if text in ("true", "false") else text for text in texts]
    for value in values:
        response = ask(endpoint, _with_partners(endpoint, path, value))
        assert response.status_code == 200, (value, response.text)
    response = try_value(endpoint, path, "tulip")
    assert response.status_code == 400 and "tulip" not in response.text


def _with_partners(endpoint: str, path: str, value: object) -> dict[str, Any]:
    """The value where it stands, with what it cannot be without."""
    body = put(around(endpoint, path), path, value)
    schema = {"name": "a", "schema": {}}
    if path in ("response_format", "text.format") or value == "json_schema":
        if path.startswith("response_format"):
            body["response_format"] = {"type": value, **({"json_schema": schema} if value == "json_schema" else {})}
        else:
            body["text"] = {"format": {"type": value, **(schema if value == "json_schema" else {})}}
    if path == "structured_outputs.json_object":
        body["structured_outputs"] = {"json_object": True} if value else {"choice": ["a"], "json_object": False}
    if path in ("add_generation_prompt", "continue_final_message"):
        body.pop("prompt", None)
        body["messages"] = [USER, {"role": "assistant", "content": "a"}]
    if path == "tool_choice" and value == "required":
        tool = FUNCTION if endpoint == "responses" else {"function": FUNCTION}
        body["tools"] = [{"type": "function", **tool}]
    if endpoint == "tokenize" and path in ("reasoning_effort", "chat_template"):
        body = {"messages": [USER], path: value}
    return body


# Of a field that has a bound on its length: a value of that length.
OF_LENGTH: dict[str, Callable[[int], Any]] = {
    "stop": lambda n: [f"{index:04}" for index in range(n)],
    "stop_token_ids": lambda n: [65] * n,
    "bad_words": lambda n: [f"{index:04}" for index in range(n)],
    "prompt": lambda n: ["a"] * n,
    "input": lambda n: ["a"] * n,
    "cache_salt": lambda n: "a" * n,
    "messages": lambda n: [USER] * n,
}
LENGTHS = [
    key for key in cases("done") if re.match(r"(a text, or |1 )?(up )?to [\d,]+ ?", ROWS[key].range) and key[1] in OF_LENGTH
]


@pytest.mark.parametrize(("endpoint", "path"), LENGTHS)
def test_lengths(endpoint: str, path: str) -> None:
    (bound,) = re.findall(r"to ([\d,]+)", ROWS[endpoint, path].range)[:1]
    length = int(bound.replace(",", ""))
    response = try_value(endpoint, path, OF_LENGTH[path](length))
    assert response.status_code == 200 or response.json()["error"]["code"] == "context_length_exceeded", response.text
    assert param_of(try_value(endpoint, path, OF_LENGTH[path](length + 1))) == path


def test_the_lengths_that_are_tried() -> None:
    assert {path for _, path in LENGTHS} == OF_LENGTH.keys()


DEFAULTS = [key for key in cases("done") if re.fullmatch(r"(the model's, else )?`[^`]+`", ROWS[key].default)]


@pytest.mark.parametrize(("endpoint", "path"), DEFAULTS)
def test_defaults(endpoint: str, path: str) -> None:
    (text,) = quoted(ROWS[endpoint, path].default)
    field = REQUESTS[endpoint].model_fields.get(path)
    if field is None or text == "n":  # of an object in the request; another field's
        return
    told = text if not re.match(r'[\d\[{"-]|true$|false$', text) else json.loads(text)
    given = field.get_default()
    given = given.model_dump(exclude_defaults=True) if isinstance(given, BaseModel) else given
    assert (list(given) if isinstance(given, tuple) else given) == told


def test_a_field_without_a_default_must_be_given() -> None:
    for endpoint, request_type in REQUESTS.items():
        for name, field in request_type.model_fields.items():
            assert (ROWS[endpoint, name].default == "must be given") == field.is_required(), (endpoint, name)


@pytest.mark.parametrize(("endpoint", "path"), KINDS)
def test_kinds(endpoint: str, path: str) -> None:
    for kind in KINDS[endpoint, path].refused or ("tulip",):
        response = try_value(endpoint, path, kind)
        assert param_of(response).startswith(path.removesuffix(".type").removesuffix(".role")), response.text


# The rest of the page.


def test_every_route_is_listed() -> None:
    told = {
        (method, path)
        for head, rows in tables()
        if head[0] == "endpoint"
        for row in rows
        for method, path in (text.split() for text in quoted(row[0]))
    }
    app = application(strict=False)
    routes = {
        (method.upper(), path.replace(":path", ""))
        for path, operations in app.openapi()["paths"].items()
        for method in operations
    }
    assert told - {("GET", "/docs"), ("GET", "/openapi.json")} == routes


def test_errors_and_the_sdk_s_exceptions() -> None:
    told = {}
    for head, rows in tables():
        if head[0] == "status":
            for statuses, kind, exception, _ in rows:
                told |= {int(status): (quoted(kind)[0], quoted(exception)[0]) for status in statuses.split(",")}
    kinds = dict.fromkeys((405, *_REFUSALS), "invalid_request_error") | {status: kind for _, status, kind in _TABLE}
    assert {status: kind for status, (kind, _) in told.items()} == kinds
    for status, (_, exception) in told.items():
        transport = httpx.MockTransport(lambda _, status=status: httpx.Response(status, json={"error": {}}))
        client = OpenAI(api_key="x", base_url="http://x", http_client=httpx.Client(transport=transport), max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            client.models.list()
        assert type(caught.value).__name__ == exception


def test_every_error_code_is_there() -> None:
    told = {code: int(row[1]) for head, rows in tables() if head[0] == "code" for row in rows for code in quoted(row[0])}
    in_code = set()
    for path in [*(ROOT / "server").rglob("*.py"), *(ROOT / "engine").rglob("*.py")]:
        in_code |= set(re.findall(r'(?:\bcode=|default_code = )"(\w+)"', path.read_text(encoding="utf-8")))
    in_code |= {"not_found", "method_not_allowed", "invalid_request"} & told.keys()
    of_http = {code: status for status, (_, code) in _REFUSALS.items()}
    assert told.keys() == in_code | of_http.keys()
    assert of_http.items() <= told.items()
    for error_type, _, _ in _TABLE:
        if error_type.default_code is not None:
            assert told[error_type.default_code] == status_and_type(error_type("x"))[0]


def test_parsers_and_the_default_tool_block() -> None:
    told = {head[0]: {quoted(row[0])[0] for row in rows} for head, rows in tables() if head[0].startswith("`--")}
    assert told == {"`--tool-parser`": set(TOOL_FORMATS), "`--reasoning-parser`": set(REASONING_FORMATS)}
    block = default_tool_block([FunctionTool(name="f", description="", parameters={}, strict=False)])
    (described,) = [line for line in block.splitlines() if line.startswith('{"type"')]
    assert block.replace(described, "{tools}") in DOCS.read_text(encoding="utf-8")


def test_the_octavo_object() -> None:
    (told,) = [[quoted(row[0])[0] for row in rows] for head, rows in tables() if head == ["field", "what"]]
    for endpoint, usage_fields in (("completions", told), ("chat", told), ("responses", told), ("embeddings", None)):
        usage = ask(endpoint, SMALLEST[endpoint] | {"explain": True}).json()["usage"]
        assert list(usage["octavo"]) == (usage_fields or ["queue_s", "prefill_s", "total_s", "cached_tokens"])


def test_links_go_somewhere() -> None:
    text = DOCS.read_text(encoding="utf-8")
    heads = {
        re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in heads if target.startswith("#") else (DOCS.parent / target).exists(), target
