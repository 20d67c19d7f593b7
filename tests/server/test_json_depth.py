"""How deep JSON is nested: against a count with a stack, and through the endpoints."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from server.api import json_depth
from server.api.json_depth import structure_fault
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.test_bad_input import error_of

STRINGS = ["", "a", "[", "]]", '"', "\\", '\\"', "\\\\", '{"', "\n", "é[", "[" * 300, '\\\\"[', "}" * 5]


def is_deeper_than(content: bytes, limit: int) -> bool:
    fault = structure_fault(content, limit)
    assert fault is None or f"{limit} deep" in fault
    return fault is not None


def depth(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


def draw_value(draw: random.Random, levels: int) -> Any:
    kind = draw.randrange(4) if levels else 3
    if kind < 2:
        return [draw_value(draw, levels - 1) for _ in range(draw.randrange(4))]
    if kind == 2:
        return {draw.choice(STRINGS) + str(number): draw_value(draw, levels - 1) for number in range(draw.randrange(4))}
    return draw.choice([*STRINGS, 1, None, True])


@pytest.mark.parametrize("chunk_bytes", [1, 7, 2**20])
@pytest.mark.parametrize("seed", range(6))
def test_random_values(seed: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_depth, "CHUNK_BYTES", chunk_bytes)
    draw = random.Random(seed)
    for _ in range(50):
        value = draw_value(draw, draw.randrange(9))
        for content in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
            for limit in range(10):
                assert is_deeper_than(content.encode(), limit) == (depth(value) > limit), (limit, content)


@pytest.mark.parametrize("content", [b"[" * 1000, b'{"a":' * 1000, b'"' + b"[" * 1000 + b'",' + b"[" * 1000, b"[[]" * 1000])
def test_what_is_never_closed_is_deep_too(content: bytes) -> None:
    assert is_deeper_than(content, 128)


@pytest.mark.parametrize(
    "content", [b"[]" * 1000, b"]" * 1000 + b"[" * 200, b'"' + b"[" * 1000, b'"\\"' + b"[" * 1000 + b'"', b""]
)
def test_what_is_wide_or_text_is_not(content: bytes) -> None:
    assert not is_deeper_than(content, 128)


def test_any_number_of_arrays_is_too_many(api: Api) -> None:
    api.config = ServerConfig(model="tiny")
    content = b'{"prompt": "a", "x": [' + b"[]," * 1_000_000 + b"[]]}"
    assert "arrays and objects" in error_of(api.request("POST", "/v1/completions", content=content), 400)["message"]
    text = json.dumps({"prompt": "[]" * 600_000, "max_tokens": 1}).encode()  # in a text they are no arrays
    assert error_of(api.request("POST", "/v1/completions", content=text), 400)["code"] == "context_length_exceeded"


def nested(levels: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * levels + "1" + closing * levels).encode()


PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("levels", [129, 1000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_too_deep_is_a_400(api: Api, path: str, levels: int, brackets: str) -> None:
    opening, closing = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    response = api.request("POST", path, content=b'{"prompt": ' + nested(levels, opening, closing) + b"}")
    error = error_of(response, 400)
    assert error["code"] == "invalid_json" and "128 deep" in error["message"]


@pytest.mark.parametrize("limit", [128, 512])
def test_what_is_as_deep_as_allowed_is_walked_without_harm(api: Api, limit: int) -> None:
    """Every field of every kind of request, nested as deep as comes through: 200 or a 400 that names a field, nothing else."""
    api.config = ServerConfig(model="tiny", max_json_depth=limit)
    for opening, closing in (("[", "]"), ('{"a":', "}"), ('{"properties":{"a":', "}}"), ('{"anyOf":[', "]}")):
        levels = (limit - 8) // (2 if len(closing) == 2 else 1)
        value = json.loads(nested(levels, opening, closing)) if limit < 200 else None
        deep = json.dumps(value) if value is not None else nested(levels, opening, closing).decode()
        schema = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {deep}}}}}'
        tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]'
        for path, body in (
            ("/v1/completions", f'{{"prompt": {deep}}}'),
            ("/v1/completions", f'{{"prompt": "a", "structured_outputs": {{"json": {deep}}}}}'),
            ("/v1/completions", f'{{"prompt": "a", "unheard_of": {deep}}}'),
            ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": {deep}}}]}}'),
            ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": "a"}}], "response_format": {schema}}}'),
            ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": {tools}}}'),
            (
                "/v1/chat/completions",
                f'{{"messages": [{{"role": "user", "content": "a"}}], "chat_template_kwargs": {{"x": {deep}}}}}',
            ),
            ("/v1/responses", f'{{"input": {deep}}}'),
            ("/v1/embeddings", f'{{"input": {deep}}}'),
        ):
            response = api.request("POST", path, content=body.encode())
            assert response.status_code in (200, 400), (path, body[:200], response.text)


@pytest.mark.parametrize("levels", [400, 900, 5000, 100_000])
def test_json_within_a_string_is_bounded_too(api: Api, levels: int) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": nested(levels, '{"a":', "}").decode()}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "a"}]
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson | length }}{% endfor %}{% endfor %}"
    )
    for own in ({}, {"chat_template": template}):
        response = api.request("POST", "/v1/chat/completions", json={"messages": messages, **own})
        assert response.status_code in (200, 400), response.text
