"""Fields of /v1/chat/completions one by one: each test fails where its field is ignored. Tools and reasoning have their own."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from engine.sampling_params import StructuredSpec
from server.api.conversation import MAX_MESSAGES
from tests.server.conftest import Api, events
from tests.server.fake_client import byte_tokenizer
from tests.server.test_chat_tools import prompt_text, with_template

ASSISTANT_LAST = [{"role": "user", "content": "u"}, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]


def chat(api: Api, messages: list[dict[str, Any]], **body: Any) -> Any:
    return api.request("POST", "/v1/chat/completions", json={"messages": messages, **body})


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"temperature": 0.25}, "temperature", 0.25),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 7}, "top_k", 7),
        ({"min_p": 0.125}, "min_p", 0.125),
        ({"typical_p": 0.5}, "typical_p", 0.5),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
        ({"frequency_penalty": -0.5}, "frequency_penalty", -0.5),
        ({"logit_bias": {"65": -100}}, "logit_bias", {65: -100}),
        ({"allowed_token_ids": [65, 66]}, "allowed_token_ids", (65, 66)),
        ({"bad_words": ["b"]}, "bad_words", None),
        ({"seed": 11}, "seed", 11),
        ({"stop_token_ids": [65]}, "stop_token_ids", (65,)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"min_tokens": 2}, "min_tokens", 2),
        ({"max_tokens": 3}, "max_tokens", 3),
        ({"max_completion_tokens": 4}, "max_tokens", 4),
        ({"n": 2}, "n", 2),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "logprobs", 20),
        ({"prompt_logprobs": 2}, "prompt_logprobs", 2),
        ({"structured_outputs": {"regex": "a+"}}, "structured", StructuredSpec("regex", "a+")),
        ({"guided_choice": ["a"]}, "structured", StructuredSpec("choice", '["a"]')),
    ],
)
def test_what_the_engine_is_asked_for(api: Api, given: dict[str, Any], field: str, expected: object) -> None:
    api.chat()
    response = api.chat(**given)
    assert response.status_code == 200, response.text
    unasked, asked = (getattr(sampling, field) for sampling in api.client.sampling)
    assert asked != unasked and (expected is None or asked == expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("skip_special_tokens", False),
        ("spaces_between_special_tokens", True),
        ("include_stop_str_in_output", True),
        ("cache_salt", "x"),
        ("priority", -3),
    ],
)
def test_how_the_engine_is_asked(api: Api, field: str, value: object) -> None:
    assert api.chat(**{field: value}).status_code == 200
    assert api.client.options[-1][field] == value


def test_stop(api: Api) -> None:
    api.chat(stop="a")
    api.chat(stop=["a", "b"])
    assert api.client.stops == [["a"], ["a", "b"]]


@pytest.mark.parametrize(
    "body",
    [
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"logprobs": True, "top_logprobs": -1},
        {"prompt_logprobs": 21},
        {"max_completion_tokens": 0},
        {"max_tokens": -1},
        {"n": 0},
        {"documents": "x"},
        {"chat_template": 7},
        {"response_format": {"type": "xml"}},
        {"include_reasoning": "yes"},
        {"stream_options": {"include_usage": True}},
    ],
)
def test_out_of_range(api: Api, body: dict[str, Any]) -> None:
    response = api.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] in body


def test_template_variables(api: Api) -> None:
    source = "{{ mood }}|{{ documents[0].text if documents }}|{{ messages[0].name }}"
    with_template(api, source)
    body = {"chat_template_kwargs": {"mood": "good"}, "documents": [{"title": "t", "text": "D"}]}
    assert chat(api, [{"role": "user", "name": "Ann", "content": "u"}], **body).status_code == 200
    assert prompt_text(api) == "good|D|Ann"
    response = api.chat(chat_template_kwargs={"messages": []})
    assert response.status_code == 400 and response.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("stream", [True, False])
def test_echo(api: Api, stream: bool) -> None:
    def text(**body: Any) -> str:
        response = chat(api, ASSISTANT_LAST, stream=stream, continue_final_message=True, **body)
        if not stream:
            return str(response.json()["choices"][-1]["message"]["content"])
        deltas = [choice for chunk in events(response) for choice in chunk["choices"]]
        last = max(choice["index"] for choice in deltas)
        return "".join(choice["delta"].get("content", "") for choice in deltas if choice["index"] == last)

    assert text() == "Hello world"
    assert text(echo=True) == "Well, Hello world"
    assert text(echo=True, n=2, logprobs=True) == "Well, Hello world"
    assert api.chat(echo=True).json()["choices"][0]["message"]["content"] == "Hello world"


def test_continue_final_message(api: Api) -> None:
    assert chat(api, ASSISTANT_LAST, continue_final_message=True).status_code == 200
    assert prompt_text(api) == "u:u;a:Well, "
    assert chat(api, ASSISTANT_LAST).status_code == 200
    assert prompt_text(api) == "u:u;a:Well, ;a:"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "assistant", "content": None, "refusal": "No."}, "a:No.;"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "a:No.;"),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "a:a\nb;"),
    ],
)
def test_refusals_and_parts(api: Api, message: dict[str, Any], text: str) -> None:
    assert chat(api, [message]).status_code == 200
    assert prompt_text(api) == f"{text}a:"


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ([{"type": "refusal", "refusal": "No."}], "messages[0].content[0]"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        ([{"type": "input_audio", "input_audio": {}}], "messages[0].content[0]"),
        ([7], "messages[0].content[0]"),
        (7, "messages[0].content"),
        (None, "messages[0].content"),
    ],
)
def test_content_that_is_no_text(api: Api, content: object, param: str) -> None:
    response = api.chat(content)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [True, False])
def test_token_ids(api: Api, stream: bool) -> None:
    response = api.chat(return_token_ids=True, stream=stream, n=2)
    chunks = events(response) if stream else [response.json()]
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [api.client.prompts[-1]]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [token_id for choice in choices for token_id in choice.get("token_ids", [])] == api.client.script
    plain = api.chat(stream=stream)
    assert "token_ids" not in plain.text


@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs(api: Api, stream: bool) -> None:
    response = api.chat(prompt_logprobs=1, stream=stream)
    found = [
        chunk["prompt_logprobs"] for chunk in (events(response) if stream else [response.json()]) if "prompt_logprobs" in chunk
    ]
    assert len(found) == 1
    first, second, *_ = found[0]
    assert first is None and len(found[0]) == len(api.client.prompts[-1])
    colon = second[str(api.client.prompts[-1][1])]
    assert colon == {"logprob": -0.5, "rank": 1, "decoded_token": ":"}
    assert "prompt_logprobs" not in api.chat(stream=stream).text


def test_truncate_prompt_tokens(api: Api) -> None:
    api.chat("a" * 20, truncate_prompt_tokens=5)
    assert prompt_text(api) == "aa;a:"
    response = api.chat("a" * 100, max_tokens=4, truncate_prompt_tokens=-1)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == 60


def test_usage_in_every_chunk(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(api.chat(stream=True, stream_options=options, max_tokens=3))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 3]
    plain = events(api.chat(stream=True, max_tokens=3))
    assert all("usage" not in chunk for chunk in plain)
    last_only = events(api.chat(stream=True, max_tokens=3, stream_options={"include_usage": True}))
    assert [chunk["usage"] is None for chunk in last_only] == [True, True, True, True, False]


@pytest.mark.parametrize("stream", [True, False])
def test_explain(api: Api, stream: bool) -> None:
    api.client.num_cached_tokens = 3
    response = api.chat(explain=True, seed=11, stream=stream)
    usage = (events(response)[-1] if stream else response.json())["usage"]
    assert usage["octavo"]["seed"] == 11 and usage["octavo"]["queue_s"] == 0.25
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert "octavo" not in api.chat(stream=stream, seed=11).text


@pytest.mark.parametrize("stream", [True, False])
def test_request_id(api: Api, stream: bool) -> None:
    response = api.chat(request_id="mine", stream=stream)
    chunks = events(response) if stream else [response.json()]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-mine"}


def test_special_tokens_beside_those_of_the_template(api: Api) -> None:
    backend = api.client.tokenizer._backend
    backend.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 256)])
    for adds in (False, True):
        assert api.chat(add_special_tokens=adds).status_code == 200
        assert (api.client.prompts[-1][0] == 256) == adds


def test_there_may_be_too_many_messages(api: Api) -> None:
    message = {"role": "user", "content": ""}
    assert chat(api, [message] * MAX_MESSAGES, truncate_prompt_tokens=4).status_code == 200
    response = chat(api, [message] * (MAX_MESSAGES + 1), truncate_prompt_tokens=4)
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"
    assert chat(api, []).json()["error"]["param"] == "messages"


def test_a_model_without_a_template_takes_the_requests(api: Api) -> None:
    api.client.tokenizer = byte_tokenizer(None)
    assert api.chat().status_code == 400
    assert api.chat(chat_template="{{ messages[0].content }}!").status_code == 200
    assert prompt_text(api) == "hi!"
