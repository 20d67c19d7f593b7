"""Whatever a client sends, it gets OpenAI's error shape with the right status, and never its own input back."""

from __future__ import annotations

import asyncio
import collections
import json
import random
from typing import Any

import httpx
import pytest

from engine.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest
from engine.messages import LoadProgress
from server.api.chat import ChatRequest
from server.api.completions import CompletionRequest
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import CONTEXT

SECRET = "tulip-bulb"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and response.headers["X-Request-Id"]
    assert SECRET not in response.text
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": NaN}', b"[" * 100_000,
        b'{"temperature": Infinity, "prompt": "a"}', b'{"temperature": 1e999, "prompt": "a"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udfff\\ud800"}', b'{"prompt": "' + SECRET.encode(), b'{"seed": ' + b"9" * 5000 + b', "prompt": "a"}',
        b'{"' + SECRET.encode() + b'": }', b'{"prompt": "a"} {}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_json(api: Api, path: str, content: bytes) -> None:
    error = error_of(api.request("POST", path, content=content), 400)
    assert error["type"] == "invalid_request_error" and error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, None]}, "prompt"),
        ({"prompt": [[1], [1.0]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": SECRET}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": ["a"] * 3000}, "prompt"),
        ({"prompt": "a", "temperature": "0.5"}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "temperature": 2.5}, "temperature"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": "a", "n": 10**400}, "n"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "seed": "1"}, "seed"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["a", 1]}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
        ({"prompt": "a", "stop": {"a": SECRET}}, "stop"),
        ({"prompt": "a", "stop_token_ids": [257]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": ["1"]}, "stop_token_ids[0]"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias[1]"),
        ({"prompt": "a", "logit_bias": {"1": SECRET}}, "logit_bias.1"),
        ({"prompt": "a", "logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
        ({"prompt": "a", "best_of": 0}, "best_of"),
        ({"prompt": "a", "best_of": 2, "n": 0}, "n"),
        ({"prompt": "a", "best_of": 2, "n": -1}, "n"),
        ({"prompt": "a", "best_of": 129}, "best_of"),
        ({"prompt": "a", "suffix": 5}, "suffix"),
        ({"prompt": "a", "typical_p": 0}, "typical_p"),
        ({"prompt": "a", "typical_p": 1.5}, "typical_p"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [257]}, "allowed_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [10**30]}, "allowed_token_ids[0]"),
        ({"prompt": "a", "allowed_token_ids": "a"}, "allowed_token_ids"),
        ({"prompt": "a", "bad_words": [""]}, "bad_words[0]"),
        ({"prompt": "a", "bad_words": [5]}, "bad_words[0]"),
        ({"prompt": "a", "bad_words": "a"}, "bad_words"),
        ({"prompt": "a", "bad_words": ["a"] * 600}, "bad_words"),
        ({"prompt": "a", "bad_words": ["a" * 300]}, "bad_words[0]"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "priority": 2**31}, "priority"),
        ({"prompt": "a", "priority": "high"}, "priority"),
        ({"prompt": "a", "request_id": "a b"}, "request_id"),
        ({"prompt": "a", "request_id": "x" * 129}, "request_id"),
        ({"prompt": "a", "request_id": ""}, "request_id"),
        ({"prompt": "a", "explain": 1}, "explain"),
        ({"prompt": "a", "return_token_ids": "yes"}, "return_token_ids"),
        ({"prompt": "a", "spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
        ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "n": -1}, "n"),
        ({"prompt": "a", "response_format": {"type": SECRET}}, "response_format.type"),
        ({"prompt": "a", "structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"prompt": "a", "logits_processors": ["x"]}, "logits_processors"),
        ({"prompt": "a", "cache_salt": "x" * 300}, "cache_salt"),
    ],
)
def test_wrong_types_and_ranges_of_completions(api: Api, body: dict[str, Any], param: str) -> None:
    error = error_of(api.complete(**body), 400)
    assert error["param"] == param, error
    assert not api.client.streams


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": SECRET, "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "a"}], "logprobs": 1}, "logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
def test_wrong_types_and_ranges_of_chat(api: Api, body: dict[str, Any], param: str) -> None:
    assert error_of(api.request("POST", "/v1/chat/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("field", "code", "message"),
    [
        ({"max_tokens": 5.0}, "invalid_type", "max_tokens must be an integer, got a number."),
        ({"temperature": "1"}, "invalid_type", "temperature must be a number, got a string."),
        ({"stream": 1}, "invalid_type", "stream must be a boolean, got an integer."),
        ({"chat_template": []}, "invalid_type", "chat_template must be a string, got an array."),
        ({"stop": 5}, "invalid_type", "stop must be a string or an array of strings, got an integer."),
        ({"messages": SECRET}, "invalid_type", "messages must be an array, got a string."),
        ({"messages": [SECRET]}, "invalid_type", "messages[0] must be an object, got a string."),
        ({"messages": []}, "invalid_value", "messages must hold at least 1, got 0."),
        ({"messages": [{"role": 5}]}, "invalid_type", "messages[0].role must be 'system', 'developer', 'user', 'assistant' or"),
        ({"reasoning_effort": SECRET}, "invalid_value", "'xhigh' or 'max', got another string."),
        ({"seed": 2**64}, "invalid_value", "seed must be at most 18446744073709551615, got more."),
        ({"seed": -(2**64)}, "invalid_value", "seed must be at least -9223372036854775808, got less."),
        ({"stop_token_ids": [1] * 2000}, "invalid_value", "stop_token_ids may hold at most 1024, got 2000."),
        ({"bad_words": [""]}, "invalid_value", "bad_words[0] must have at least 1 characters, got fewer."),
        ({"cache_salt": "x" * 300}, "invalid_value", "cache_salt may have at most 256 characters, got more."),
        ({"request_id": SECRET + " "}, "invalid_value", "request_id must match the pattern ^[A-Za-z0-9._:-]{1,128}$, got"),
        ({"logit_bias": []}, "invalid_type", "logit_bias must be an object, got an array."),
        ({"logit_bias": {"1": 1, "7": None}}, "invalid_type", "logit_bias.7 must be a number, got null."),
        ({"temperature": 9}, "invalid_value", "temperature must be between 0.0 and 2.0"),
    ],
)
def test_a_wrong_type_is_told_from_a_wrong_value(api: Api, field: dict[str, Any], code: str, message: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **field}
    error = error_of(api.request("POST", "/v1/chat/completions", json=body), 400)
    assert error["code"] == code and message in error["message"], error


def test_a_body_that_is_too_large(api: Api) -> None:
    api.config = ServerConfig(model="tiny", max_body_bytes=1024)
    assert error_of(api.complete(prompt="a" * 2000), 413)["code"] == "body_too_large"


def test_past_the_context(api: Api) -> None:
    error = error_of(api.complete(prompt="a" * 60, max_tokens=5), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
    for number in (CONTEXT, 60, 5, 65):
        assert str(number) in error["message"]
    body = {"input": "a" * CONTEXT, "max_output_tokens": 4}
    too_long = {  # by themselves, so it is not the limit of tokens that is wrong
        "prompt": api.complete(prompt="a" * CONTEXT, max_tokens=4),
        "messages": api.chat("a" * CONTEXT, max_tokens=4),
        "input": api.request("POST", "/v1/responses", json=body),
    }
    for param, response in too_long.items():
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == param, error
    assert api.complete(prompt="a" * 60).status_code == 200  # the default limit gives way
    assert api.client.sampling[-1].max_tokens == 4
    assert api.complete(prompt="a" * CONTEXT, max_tokens=0, echo=True).status_code == 200


def test_unknown_models_paths_and_methods(api: Api) -> None:
    error = error_of(api.complete(prompt="a", model=SECRET), 404)
    assert error["code"] == "model_not_found" and error["param"] == "model"
    error_of(api.get(f"/v1/models/{SECRET}"), 404)
    error_of(api.get(f"/{SECRET}"), 404)
    error_of(api.get("/v1/models/"), 404)
    error_of(api.get("/v1/completions"), 405)
    error_of(api.request("DELETE", "/health"), 405)


def test_what_the_engine_refuses(api: Api) -> None:
    for refusal, status in (
        (InvalidRequest("needs more pages than there are", param="max_tokens"), 400),
        (ContextLengthExceeded("too long"), 400),
        (EngineUnavailable("it died"), 503),
    ):
        api.client.refusal = refusal
        for stream in (True, False):
            assert error_of(api.complete(prompt="a", stream=stream), status)["message"] == refusal.message


def test_before_and_after_the_engine(api: Api) -> None:
    api.client.state, api.client.progress = "starting", LoadProgress("weights", "model.safetensors", 0.4)
    response = api.complete(prompt="a")
    assert "weights model.safetensors, 40%" in error_of(response, 503)["message"]
    assert response.headers["Retry-After"]
    api.client.state, api.client.failure = "failed", EngineUnavailable("the engine process died")
    assert "died" in error_of(api.chat(), 503)["message"]


def test_api_keys(api: Api) -> None:
    api.config = ServerConfig(model="tiny", api_key=["k1", "kéy"])
    for headers in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "k1"}, {"Authorization": "Basic k1"}):
        response = api.get("/v1/models", headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
    for key in (b"k1", "kéy".encode()):
        assert api.get("/v1/models", headers={"Authorization": b"Bearer " + key}).status_code == 200
    assert [api.get(f"/health{which}").status_code != 401 for which in ("", "/live", "/ready")] == [True] * 3
    for path in ("/", "/metrics", "/docs", "/openapi.json", "/nothing", "/health/", "//health"):
        assert api.get(path).status_code == 401, path
    assert api.get("/v1/models", headers={"Host": "x/health?"}).status_code == 401


def test_request_ids(api: Api) -> None:
    assert api.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    assert len(api.get("/health", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]) == 32


def test_a_bug_is_a_500_without_details(api: Api) -> None:
    api.client.refusal = RuntimeError(SECRET)  # type: ignore[assignment]
    response = api.complete(prompt="a")
    assert response.status_code == 500 and SECRET not in response.text
    assert response.json()["error"]["code"] == "internal_error"


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 17, 10**18, 10**40, 0.5, -0.0, 1e308, "", "a", "é\u0000\n", "x" * 300, [], [1], ["a"], [[]],
    [None], [[1], ["a"]], {}, {"a": 1}, {"1": 2}, {"type": "text"}, [{"role": "user", "content": "a"}], [{"role": "user"}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}], [{"type": "text", "text": "a"}], [257], [65, 66],
]  # fmt: skip
FIELDS = [*{**ChatRequest.model_fields, **CompletionRequest.model_fields}, "tools", "response_format", "best_of", "unheard_of"]


def junk_request(rng: random.Random) -> tuple[str, bytes]:
    """Path and body of one request: mostly well-formed, with values that do not belong where they are."""
    chat = rng.random() < 0.5
    value = rng.choice(["hi", rng.choice(JUNK)])
    body = {"messages": [{"role": "user", "content": value}]} if chat else {"prompt": value}
    if rng.random() < 0.1:
        body = {"messages" if chat else "prompt": rng.choice(JUNK)}
    body |= {name: rng.choice(JUNK) for name in rng.sample(FIELDS, rng.choice([0, 1, 1, 2, 4]))}
    content = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return "/v1/chat/completions" if chat else "/v1/completions", bytes(content)


def test_seeded_junk_never_gets_a_5xx(api: Api) -> None:
    rng = random.Random(7)
    statuses: collections.Counter[int] = collections.Counter()

    async def send() -> None:
        async with api.client.http(api.config) as http:
            for _ in range(600):
                path, content = junk_request(rng)
                response = await http.post(path, content=content)
                statuses[response.status_code] += 1
                assert response.status_code in (200, 400, 404), (content, response.text)
                if response.status_code != 200:
                    error_of(response, response.status_code)

    asyncio.run(send())
    assert statuses[200] > 50 and statuses[400] > 100
