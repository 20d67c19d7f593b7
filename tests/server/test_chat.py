"""/v1/chat/completions: shapes of messages and answers."""

from __future__ import annotations

from typing import Any

import pytest

from server.config import ServerConfig
from tests.server.conftest import Api, events
from tests.server.fake_client import CONTEXT, byte_tokenizer


def prompt_text(api: Api) -> str:
    return api.client.tokenizer.decode(api.client.prompts[-1])


def test_a_plain_answer(api: Api) -> None:
    body = api.chat().json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert body["usage"]["total_tokens"] == len("u:hi;a:") + 11
    assert prompt_text(api) == "u:hi;a:"


def test_the_default_limit_is_what_is_left_of_the_context(api: Api) -> None:
    api.chat()
    api.chat(max_tokens=3)
    api.chat(max_completion_tokens=4)
    assert [sampling.max_tokens for sampling in api.client.sampling] == [CONTEXT - 7, 3, 4]
    assert api.chat(max_tokens=3, max_completion_tokens=4).status_code == 400


def test_a_stream_says_the_role_first(api: Api) -> None:
    chunks = events(api.chat(stream=True, n=2, max_tokens=2, stream_options={"include_usage": True}))
    assert chunks.pop()["usage"]["completion_tokens"] == 4
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert [delta["delta"] for delta in deltas[1:]] == [{"content": "H"}, {"content": "e"}]
        assert [delta["finish_reason"] for delta in deltas] == [None, None, "length"]


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs(api: Api, stream: bool) -> None:
    response = api.chat(logprobs=True, top_logprobs=2, max_tokens=2, stream=stream)
    choices = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert [(entry["token"], entry["bytes"], entry["logprob"]) for entry in content] == [("H", [72], -0.5), ("e", [101], -0.5)]
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "s:s;u:u;a:"),
        ([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}], "s:d;u:u;a:"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "u:a\nb;a:"),
        ([{"role": "assistant", "content": None}, {"role": "user", "content": "u"}], "a:;u:u;a:"),
        (
            [{"role": "assistant", "content": "x", "refusal": None, "audio": None}, {"role": "user", "content": "u"}],
            "a:x;u:u;a:",
        ),
    ],
)
def test_messages(api: Api, messages: list[dict[str, Any]], text: str) -> None:
    response = api.request("POST", "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200, response.text
    assert prompt_text(api) == text
    assert "X-Octavo-Ignored-Fields" not in response.headers


def test_continue_the_final_message(api: Api) -> None:
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "Sure"}]
    body = {"messages": messages, "continue_final_message": True}
    assert api.request("POST", "/v1/chat/completions", json=body).status_code == 200
    assert prompt_text(api) == "u:u;a:Sure"
    assert api.chat(add_generation_prompt=False).status_code == 200
    assert prompt_text(api) == "u:hi;"
    assert api.request("POST", "/v1/chat/completions", json={**body, "add_generation_prompt": True}).status_code == 400


def test_unknown_message_fields_are_listed(api: Api) -> None:
    body = {"messages": [{"role": "user", "content": "u", "mood": "good"}]}
    response = api.request("POST", "/v1/chat/completions", json=body)
    assert response.headers["X-Octavo-Ignored-Fields"] == "messages[0].mood"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio", {"voice": "x"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("moderation", {"model": "m"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
    ],
)
def test_what_this_server_does_not_do_is_refused_by_name(api: Api, name: str, value: object) -> None:
    response = api.chat(**{name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name and error["code"] == "unsupported_parameter" and "not supported" in error["message"]


def test_what_asks_for_nothing_is_accepted(api: Api) -> None:
    response = api.chat(
        tools=[], tool_choice="none", functions=[], response_format={"type": "text"}, modalities=["text"], stop=None
    )
    assert response.status_code == 200 and "X-Octavo-Ignored-Fields" not in response.headers


@pytest.mark.parametrize("strict", [True, False])
def test_what_has_no_effect_is_listed(api: Api, strict: bool) -> None:
    api.config = ServerConfig(model="tiny", strict=strict)
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}]},
        {"role": "assistant", "content": "b", "annotations": []},
    ]
    body = {"messages": messages, "verbosity": "low", "store": True, "user": "me"}
    response = api.request("POST", "/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert set(response.headers["X-Octavo-Ignored-Fields"].split(", ")) == {
        "verbosity",
        "store",
        "user",
        "messages[0].content[0].prompt_cache_breakpoint",
        "messages[1].annotations",
    }


def test_images_are_refused_by_place(api: Api) -> None:
    response = api.chat([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}])
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "messages[0].content[1]" and "no images" in error["message"]


def test_the_template_refuses_and_there_may_be_none(api: Api) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    response = api.request("POST", "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400 and "no tools here" in response.json()["error"]["message"]
    api.client.tokenizer = byte_tokenizer(None)
    response = api.chat()
    assert response.status_code == 400 and "--chat-template" in response.json()["error"]["message"]
