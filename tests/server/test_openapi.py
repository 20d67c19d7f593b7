"""The OpenAPI document against the application: every route is in it, and what it says of requests and answers is so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest

from server.config import ServerConfig
from server.openapi import OPERATIONS, Operation
from server.openapi_examples import ANSWERS, REQUESTS, STREAMS
from server.openapi_fields import FIELDS
from tests.server.conftest import Api, events

METHODS = [(key, *key.split(" ", 1), operation) for key, operation in OPERATIONS.items()]
EXAMPLES = [(known, name) for known in OPERATIONS.values() if known.request for name in REQUESTS[known.id]]


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    return api.get("/openapi.json").json()


def check(document: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def answer_schema(document: dict[str, Any], known: Operation, media_type: str) -> dict[str, Any]:
    (key,) = [key for key, operation in OPERATIONS.items() if operation is known]
    method, path = key.split(" ")
    content = document["paths"][path][method.lower()]["responses"]["200"]["content"][media_type]
    if "schema" in content:
        return content["schema"]
    data = content["itemSchema"]["properties"]["data"]
    return (data["anyOf"][-1] if known.done else data)["contentSchema"]


def request_properties(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(type, field, schema) of every request type and what is in it."""
    seen: set[str] = set()
    names = [operation.request.__name__ for operation in OPERATIONS.values() if operation.request]
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        schema = document["components"]["schemas"][name]
        names += re.findall(r"#/components/schemas/(\w+)", json.dumps(schema))
        for field, given in schema.get("properties", {}).items():
            yield name, field, given


def test_every_route_is_in_the_document_and_nothing_else(document: dict[str, Any]) -> None:
    found = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert found == set(OPERATIONS)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))):
        node: Any = document
        for part in reference.split("/"):
            node = node[part]


def test_every_field_of_a_request_is_described(document: dict[str, Any]) -> None:
    fields = list(request_properties(document))
    assert [f"{name}.{field}" for name, field, given in fields if not given.get("description")] == []
    known = {field for _, field, _ in fields} | {f"{name}.{field}" for name, field, _ in fields}
    assert sorted(set(FIELDS) - known) == [], "described, but no field"


def test_null_is_not_given(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name, field, given in request_properties(document):
        if field in schemas[name].get("required", ()):
            continue
        check(document, given, None)


@pytest.mark.parametrize(("known", "name"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else value.id)
def test_example_requests_are_answered_as_the_document_says(api: Api, document: dict[str, Any], known: Operation, name: str):
    body = REQUESTS[known.id][name]
    assert api.client.ready is not None
    api.client.ready = msgspec.structs.replace(api.client.ready, max_model_len=2048)  # tools are long in the fake's tokens
    check(document, {"$ref": f"#/components/schemas/{known.request.__name__}"}, body)
    (path,) = [path for _, _, path, operation in METHODS if operation is known]
    for stream in {bool(body.get("stream")), bool(known.events)}:
        response = api.request("POST", path, json={**body, "stream": stream} if known.events else body)
        assert response.status_code == 200, response.text
        if not stream:
            check(document, answer_schema(document, known, "application/json"), response.json())
            continue
        schema = answer_schema(document, known, "text/event-stream")
        for data in events(response) if known.done else named_events(response.text):
            check(document, schema, data)


def named_events(text: str) -> list[Any]:
    """The JSON of events that have a name, which is their type, and no [DONE] behind them."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", block).groups()
        found.append(json.loads(data))
        assert found[-1]["type"] == name
    return found


def test_example_answers_are_what_is_answered(document: dict[str, Any]) -> None:
    by_id = {operation.id: operation for operation in OPERATIONS.values()}
    for operation_id, answer in ANSWERS.items():
        check(document, answer_schema(document, by_id[operation_id], "application/json"), answer)
    for operation_id, stream in STREAMS.items():
        schema = answer_schema(document, by_id[operation_id], "text/event-stream")
        for data in re.findall(r"^data: (\{.*)$", stream, re.MULTILINE):
            check(document, schema, json.loads(data))
    assert {operation.id for operation in by_id.values() if operation.events} == set(STREAMS)
    assert {operation.id for operation in by_id.values() if operation.request} == set(REQUESTS)


def bounds(path: str, document: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(field, a number just outside the range that the document gives)."""
    operation = document["paths"][path]["post"]
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    for field, given in document["components"]["schemas"][name]["properties"].items():
        step = 1 if "integer" in given.get("type", ()) else 0.01
        outside = {"minimum": -step, "exclusiveMinimum": 0, "maximum": step, "exclusiveMaximum": 0}
        for key, beyond in outside.items():
            if key in given:
                yield field, given[key] + beyond


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
    ],
)
def test_numbers_outside_the_ranges_are_refused(api: Api, document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    outside = list(bounds(path, document))
    assert len(outside) > 20
    for field, number in outside:
        response = api.request("POST", path, json={**body, field: number})
        assert response.status_code == 400, f"{field}: {number}"
        assert response.json()["error"]["param"] == field


def test_errors_have_the_documented_body(api: Api, document: dict[str, Any]) -> None:
    for response in (api.complete(), api.complete(prompt="a", model="nobody"), api.get("/nothing")):
        check(document, {"$ref": "#/components/schemas/Error"}, response.json())


def test_what_needs_a_key(api: Api, document: dict[str, Any]) -> None:
    assert document["security"] == [{}, {"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    api.config = ServerConfig(model="tiny", api_key=["k"])
    locked = api.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    assert locked["security"] == [{"bearer": []}]
    for path, methods in locked["paths"].items():
        if "get" in methods and "{" not in path:
            assert (api.get(path).status_code == 401) == ("security" not in methods["get"]), path


def test_the_page_loads_nothing_from_elsewhere(api: Api) -> None:
    response = api.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert 'fetch("openapi.json")' in response.text
    assert not re.search(r"https?://|\bsrc=|@import|<link", response.text)
