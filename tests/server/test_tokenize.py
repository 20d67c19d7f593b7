"""/tokenize and /detokenize: prompts and conversations to ids and back, each field, and what is refused."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from tests.server.conftest import Api

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def tokenize(api: Api, **body: Any) -> httpx.Response:
    return api.request("POST", "/tokenize", json=body)


def detokenize(api: Api, **body: Any) -> httpx.Response:
    return api.request("POST", "/detokenize", json=body)


def text_of(api: Api, response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return api.client.tokenizer.decode(response.json()["tokens"], skip_special_tokens=False)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_a_prompt(api: Api) -> None:
    ids = api.client.tokenizer.encode("hi you")
    assert tokenize(api, prompt="hi you", model="tiny").json() == {
        "count": 6, "max_model_len": 64, "tokens": ids, "token_strs": None,
    }  # fmt: skip
    assert tokenize(api, prompt="").json()["tokens"] == []
    assert tokenize(api, prompt="a" * 200).json()["count"] == 200, "longer than the context: told, not refused"


def test_token_strs_are_the_vocabulary_s(api: Api) -> None:
    assert tokenize(api, prompt="a b", return_token_strs=True).json()["token_strs"] == ["a", "Ġ", "b"]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)]
)
def test_add_special_tokens(api: Api, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool], expected: bool) -> None:
    asked = []
    monkeypatch.setattr(
        api.client.tokenizer, "encode", lambda text, *, add_special_tokens: asked.append(add_special_tokens) or [1]
    )
    assert tokenize(api, prompt="a", **given).json()["tokens"] == [1] and asked == [expected]


def test_a_conversation_is_what_a_chat_completion_begins_with(api: Api) -> None:
    assert api.client.ready is not None
    api.client.ready = msgspec.structs.replace(api.client.ready, max_model_len=4096)
    for fields in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}, {"tools": [TOOL]}):
        response = tokenize(api, messages=MESSAGES, **fields)
        assert api.request("POST", "/v1/chat/completions", json={"messages": MESSAGES, **fields}).status_code == 200
        assert response.json()["tokens"] == api.client.prompts[-1]
    assert text_of(api, tokenize(api, messages=MESSAGES)) == "u:hi;a:yo;a:"
    assert text_of(api, tokenize(api, messages=MESSAGES, add_generation_prompt=False)) == "u:hi;a:yo;"
    assert text_of(api, tokenize(api, messages=MESSAGES, continue_final_message=True)) == "u:hi;a:yo"


def test_the_chat_template_s_fields(api: Api) -> None:
    template = "{{ messages | length }}{{ mood }}{{ reasoning_effort }}{{ documents | length }}{{ tools | length }}"
    response = tokenize(
        api,
        messages=MESSAGES,
        chat_template=template,
        chat_template_kwargs={"mood": "gay"},
        reasoning_effort="low",
        documents=[{"text": "a"}],
        tools=[TOOL, {**TOOL, "function": {"name": "other"}}],
    )
    assert text_of(api, response) == "2gaylow12"
    none = tokenize(api, messages=MESSAGES, chat_template="{{ tools is none }}", tools=[TOOL], tool_choice="none")
    assert text_of(api, none) == "True"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None, "messages": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1]}, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt"),
        ({"prompt": "a", "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": MESSAGES, "chat_template_kwargs": 5}, "chat_template_kwargs"),
    ],
)
def test_what_is_refused(api: Api, body: dict[str, Any], param: str) -> None:
    assert error_of(tokenize(api, **body))["param"] == param


def test_models_and_unknown_fields(api: Api) -> None:
    assert error_of(tokenize(api, prompt="a", model="other"), 404)["code"] == "model_not_found"
    assert error_of(detokenize(api, tokens=[1], model="other"), 404)["code"] == "model_not_found"
    response = tokenize(api, messages=[{**MESSAGES[0], "mood": 1}], nonsense=1)
    assert response.headers["X-Octavo-Ignored-Fields"] == "nonsense, messages[0].mood"
    api.config = api.config.model_copy(update={"strict": True})
    assert error_of(tokenize(api, prompt="a", nonsense=1))["param"] == "nonsense"
    assert error_of(tokenize(api, messages=[{**MESSAGES[0], "mood": 1}]))["param"] == "messages[0].mood"
    assert error_of(detokenize(api, tokens=[1], nonsense=1))["param"] == "nonsense"


def test_before_the_engine_is_ready(api: Api) -> None:
    api.client.state, api.client.ready = "starting", None
    assert error_of(tokenize(api, prompt="a"), 503)["code"] == "engine_unavailable"
    assert error_of(detokenize(api, tokens=[1]), 503)["code"] == "engine_unavailable"


def test_back_to_text(api: Api) -> None:
    ids = api.client.tokenizer.encode("hé\n")
    assert detokenize(api, tokens=ids, model="tiny").json() == {"prompt": "hé\n"}
    assert detokenize(api, tokens=[*ids, 256]).json() == {"prompt": "hé\n<eos>"}, "special tokens are shown"
    assert detokenize(api, tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tokens"),
        ({"tokens": "a"}, "tokens"),
        ({"tokens": [257]}, "tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": ["1"]}, "tokens[0]"),
        ({"tokens": [1.0]}, "tokens[0]"),
        ({"tokens": [True]}, "tokens[0]"),
        ({"tokens": [10**30]}, "tokens[0]"),
    ],
)
def test_ids_that_are_none(api: Api, body: dict[str, Any], param: str) -> None:
    assert error_of(detokenize(api, **body))["param"] == param
