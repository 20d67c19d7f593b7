"""/v1/chat/completions with tools: what the template and the engine get, what comes back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.sampling_params import SamplingParams
from server.config import ServerConfig
from tests.server.conftest import Api, events
from tests.server.fake_client import byte_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>;{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.name }} {{ m.tool_call_id }}){% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}assistant:"
THINKING_TEMPLATE = TEMPLATE + "{# <think> </think> #}"

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]

WEATHER_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
SCRIPTS = {
    "text": "Hello, <b>world</b>!",
    "call": WEATHER_CALL,
    "text and calls": f"Let me see.\n{WEATHER_CALL}\n{TIME_CALL}",
    "malformed": '<tool_call>\n{"name": weather}\n</tool_call> so',
    "broken off": WEATHER_CALL[:50],
    "thoughts and calls": f"<think>\nWhere?\n</think>\n\nI see.\n{WEATHER_CALL}",
}


@pytest.fixture
def tools_api(api: Api) -> Api:
    """A model whose template knows tools, with room for them."""
    return with_template(api, TEMPLATE)


def with_template(api: Api, template: str) -> Api:
    api.client.tokenizer = byte_tokenizer(template)
    assert api.client.ready is not None
    api.client.ready = msgspec.structs.replace(api.client.ready, max_model_len=8192)
    return api


def say(api: Api, text: str) -> None:
    api.client.script = api.client.tokenizer.encode(text)


def prompt_text(api: Api) -> str:
    return api.client.tokenizer.decode(api.client.prompts[-1])


def grammar(api: Api) -> str | None:
    """The Lark that the engine was given."""
    sampling: SamplingParams = api.client.sampling[-1]
    if sampling.structured is None:
        return None
    assert sampling.structured.kind == "lark"
    return sampling.structured.text


def accepts(lark: str | None, text: str) -> bool:
    """Whether a text is a whole answer by a grammar."""
    assert lark is not None
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    for token_id in tokenizer.tokenize_str(text):
        if not matcher.consume_token(token_id):
            return False
    return bool(matcher.is_accepting())


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids are drawn, so no two answers have the same."""
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls) and all(call["id"] for call in calls)
    return {**message, "tool_calls": [{**call, "id": ""} for call in calls]}


def joined(chunks: list[Any], index: int) -> dict[str, Any]:
    """A choice put together from its chunks as the SDKs do it."""
    message: dict[str, Any] = {"refusal": None, "content": None}
    finish_reasons = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        finish_reasons.append(choice["finish_reason"])
        for field in ("role", "content", "reasoning_content"):
            if delta.get(field):
                message[field] = (message.get(field) or "") + delta[field]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
            else:
                assert "id" not in call and "name" not in call["function"]
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert set(finish_reasons[:-1]) <= {None}
    return {"message": message, "finish_reason": finish_reasons[-1]}


def test_a_call(tools_api: Api) -> None:
    say(tools_api, WEATHER_CALL)
    (choice,) = tools_api.chat(tools=TOOLS).json()["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert choice["finish_reason"] == "tool_calls"
    assert '"name": "weather", "description": "Now."' in prompt_text(tools_api)


def test_a_streamed_call_begins_with_its_name(tools_api: Api) -> None:
    say(tools_api, f"Well.\n{WEATHER_CALL}")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(tools_api.chat(tools=TOOLS, stream=True))]
    assert deltas[0] == {"role": "assistant", "content": ""}
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    first = calls[0]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather") and first["id"]
    assert all(call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"} for call in calls[1:])
    assert len(calls) > 5 and "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rome"}'
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("limit", [None, 40])
def test_streamed_is_as_unstreamed(tools_api: Api, script: str, n: int, limit: int | None) -> None:
    with_template(tools_api, THINKING_TEMPLATE)
    say(tools_api, script)
    body = {"tools": TOOLS, "n": n, "max_tokens": limit, "logprobs": n == 1}
    whole = tools_api.chat(**body).json()
    chunks = events(tools_api.chat(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        streamed = joined(chunks, choice["index"])
        assert without_ids(streamed["message"]) == without_ids(choice["message"])
        assert streamed["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("options", "script", "reason"),
    [
        ({}, "Hello", "stop"),
        ({}, WEATHER_CALL, "tool_calls"),
        ({"tool_choice": "required"}, WEATHER_CALL, "tool_calls"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, WEATHER_CALL, "stop"),
        ({"max_tokens": 55}, WEATHER_CALL, "length"),
        ({"max_tokens": 3}, "Hello", "length"),
        ({"tool_choice": "none"}, WEATHER_CALL, "stop"),
    ],
)
def test_finish_reasons(tools_api: Api, options: dict[str, Any], script: str, reason: str, stream: bool) -> None:
    say(tools_api, script)
    response = tools_api.chat(tools=TOOLS, stream=stream, **options)
    last = events(response)[-1] if stream else response.json()
    assert last["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("stream", [True, False])
def test_the_choice_none_hides_the_tools(tools_api: Api, stream: bool) -> None:
    say(tools_api, WEATHER_CALL)
    response = tools_api.chat(tools=TOOLS, tool_choice="none", stream=stream)
    message = joined(events(response), 0)["message"] if stream else response.json()["choices"][0]["message"]
    assert message["content"] == WEATHER_CALL and "tool_calls" not in message
    assert prompt_text(tools_api) == "user:hi;assistant:"


@pytest.mark.parametrize("stream", [True, False])
def test_one_call_at_most_without_parallel_calls(tools_api: Api, stream: bool) -> None:
    say(tools_api, f"{WEATHER_CALL}\n{TIME_CALL}")
    for parallel, names in ((True, ["weather", "time"]), (False, ["weather"])):
        response = tools_api.chat(tools=TOOLS, parallel_tool_calls=parallel, stream=stream)
        message = joined(events(response), 0)["message"] if stream else response.json()["choices"][0]["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == names


def test_what_constrains_the_output(tools_api: Api) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    no_city = WEATHER_CALL.replace("city", "town")
    tools_api.chat(tools=TOOLS)
    assert grammar(tools_api) is None
    tools_api.chat(tools=TOOLS, tool_choice="required")
    required = grammar(tools_api)
    assert [accepts(required, text) for text in (WEATHER_CALL, TIME_CALL, no_city, "Hello", "")] == [True, True, *[False] * 3]
    assert accepts(required, f"{WEATHER_CALL}\n{TIME_CALL}")
    tools_api.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert accepts(grammar(tools_api), TIME_CALL) and not accepts(grammar(tools_api), f"{WEATHER_CALL}\n{TIME_CALL}")
    tools_api.chat(tools=TOOLS, tool_choice=named)
    assert accepts(grammar(tools_api), WEATHER_CALL) and not accepts(grammar(tools_api), TIME_CALL)
    assert not accepts(grammar(tools_api), f"{WEATHER_CALL}\n{WEATHER_CALL}")


def test_a_strict_function_constrains_calls_of_the_models_own_accord(tools_api: Api) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    tools_api.chat(tools=[strict, TIME])
    lazy = grammar(tools_api)
    assert accepts(lazy, "Hello") and accepts(lazy, WEATHER_CALL)
    assert not accepts(lazy, WEATHER_CALL.replace("city", "town"))


@pytest.mark.parametrize("strict", [True, False])
def test_a_functions_schema_is_read_as_that_of_an_answer(tools_api: Api, strict: bool) -> None:
    """Keywords that ask for nothing, bounds as in draft 4, and the classes of patterns."""
    properties = {
        "pins": {"type": "array", "items": {"type": "string", "pattern": r"^\d{2}$"}, "uniqueItems": False},
        "days": {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
    }
    parameters = {"type": "object", "properties": properties, "required": ["pins", "days"], "additionalProperties": False}
    function = {"name": "unlock", "parameters": parameters, "strict": strict}
    assert tools_api.chat(tools=[{"type": "function", "function": function}], tool_choice="required").status_code == 200
    texts = ('{"pins": ["12"], "days": 2}', '{"pins": ["\u0663\u0663"], "days": 2}', '{"pins": [], "days": 1}')
    calls = [f'<tool_call>\n{{"name": "unlock", "arguments": {text}}}\n</tool_call>' for text in texts]
    assert [accepts(grammar(tools_api), call) for call in calls] == [True, False, False]
    assert r"^\\d{2}$" in prompt_text(tools_api)


def test_an_answer_that_is_constrained_may_be_a_call_instead(tools_api: Api) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
    tools_api.chat(tools=TOOLS, response_format=response_format)
    either = grammar(tools_api)
    assert accepts(either, "{}") and accepts(either, WEATHER_CALL) and not accepts(either, "Hello")
    tools_api.chat(tools=TOOLS, response_format=response_format, tool_choice="required")
    assert accepts(grammar(tools_api), WEATHER_CALL) and not accepts(grammar(tools_api), "{}")
    tools_api.chat(tools=TOOLS, response_format=response_format, tool_choice="none")
    structured = tools_api.client.sampling[-1].structured
    assert structured is not None and structured.kind == "json_schema"


def test_a_forced_call_comes_after_the_thoughts(tools_api: Api) -> None:
    with_template(tools_api, THINKING_TEMPLATE)
    tools_api.chat(tools=TOOLS, tool_choice="required")
    forced = grammar(tools_api)
    assert accepts(forced, f"<think>\nWhere?\n</think>\n\n{WEATHER_CALL}") and accepts(forced, WEATHER_CALL)
    assert not accepts(forced, f"Where? {WEATHER_CALL}")


def test_allowed_tools(tools_api: Api) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    tools_api.chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert accepts(grammar(tools_api), TIME_CALL) and not accepts(grammar(tools_api), WEATHER_CALL)
    assert '"time"' in prompt_text(tools_api) and "weather" not in prompt_text(tools_api)
    allowed["mode"] = "auto"
    tools_api.chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert grammar(tools_api) is None and "weather" not in prompt_text(tools_api)


def test_what_is_unknown_in_a_tool_choice_is_listed_or_refused(tools_api: Api) -> None:
    choice = {"type": "function", "function": {"name": "weather", "mood": 1}, "n": 2, "why": None}
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}, "x": 1}]}
    for given, unknown in (
        (choice, ["tool_choice.function.mood", "tool_choice.n"]),
        ({"type": "allowed_tools", "allowed_tools": allowed}, ["tool_choice.allowed_tools.tools[0].x"]),
    ):
        answer = tools_api.chat(tools=TOOLS, tool_choice=given)
        assert answer.is_success, answer.text
        assert answer.headers["X-Octavo-Ignored-Fields"] == ", ".join(unknown)
    tools_api.config = ServerConfig(model="tiny", strict=True)
    error = tools_api.chat(tools=TOOLS, tool_choice=choice).json()["error"]
    assert (error["param"], error["code"]) == ("tool_choice.function.mood", "unknown_field")


def bad_tools() -> Iterator[tuple[dict[str, Any], str]]:
    function = WEATHER["function"]
    assert isinstance(function, dict)
    for name in ("", "a b", "x" * 65, "é"):
        yield {"tools": [{"type": "function", "function": {"name": name}}]}, "tools[0].function.name"
    yield {"tools": [WEATHER, TIME, WEATHER]}, "tools[2].function.name"
    yield {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].custom"
    yield {"tools": [{"type": "web_search"}]}, "tools[0].type"
    yield {"tools": [{"type": "function"}]}, "tools[0].function"
    yield {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"
    yield {"tools": [TIME] * 129}, "tools"
    for parameters, path in (
        ({"type": "string"}, ""),
        ({"type": ["object", "null"]}, ""),
        ({"type": "object", "properties": []}, ".properties"),
        ({"type": "object", "required": [{"a": 1}]}, ".required"),
        (7, ""),
    ):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        yield {"tools": [tool]}, f"tools[0].function.parameters{path}"
    unknown = {"type": "object", "properties": {"a": {"not": {}}}}
    yield (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": unknown}}]},
        "tools[0].function.parameters",
    )
    yield {"tool_choice": "required"}, "tool_choice"
    yield {"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"
    for choice, param in (
        ("sometimes", "tool_choice"),
        (7, "tool_choice"),
        ({"type": "function", "function": {"name": "other"}}, "tool_choice.function.name"),
        ({"type": "function", "function": {}}, "tool_choice.function.name"),
        ({"type": "function"}, "tool_choice.function.name"),
        ({"type": "custom", "custom": {"name": "f"}}, "tool_choice.type"),
        ({"type": "allowed_tools"}, "tool_choice.allowed_tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "all"}}, "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [7]}}, "tool_choice.allowed_tools.tools[0]"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "other"}}]}},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ):
        yield {"tools": TOOLS, "tool_choice": choice}, param


@pytest.mark.parametrize(("body", "param"), list(bad_tools()))
def test_bad_tools_are_named_by_their_place(tools_api: Api, body: dict[str, Any], param: str) -> None:
    response = tools_api.chat(**body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"
    assert not tools_api.client.prompts


def loop_messages(call: dict[str, Any], **result: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees", **result},
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_loop_of_two_turns(tools_api: Api, stream: bool) -> None:
    say(tools_api, WEATHER_CALL)
    response = tools_api.chat(tools=TOOLS, stream=stream)
    message = joined(events(response), 0)["message"] if stream else response.json()["choices"][0]["message"]
    say(tools_api, "It is warm.")
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": [{"type": "text", "text": "21"}]}
    body = {"messages": [{"role": "user", "content": "hi"}, message, result], "tools": TOOLS}
    answer = tools_api.request("POST", "/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "It is warm."
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert "X-Octavo-Ignored-Fields" not in answer.headers
    call_id = result["tool_call_id"]
    turns = f'user:hi;assistant:<weather {{"city": "Rome"}}>;tool:21(weather {call_id});assistant:'
    assert prompt_text(tools_api).endswith(turns)


def test_arguments_may_be_an_object(tools_api: Api) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    body = {"messages": loop_messages(call), "tools": TOOLS}
    assert tools_api.request("POST", "/v1/chat/completions", json=body).status_code == 200
    assert '<weather {"city": "Rome"}>' in prompt_text(tools_api)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        (loop_messages(CALL, tool_call_id="2"), "messages[2].tool_call_id"),
        (loop_messages(CALL, content=None), "messages[2].content"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}], "messages[0].tool_calls[0].type"),
        ([{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": 7}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}], "messages[0].function_call"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages[0].role"),
    ],
)
def test_bad_turns_are_named_by_their_place(tools_api: Api, messages: list[dict[str, Any]], param: str) -> None:
    response = tools_api.request("POST", "/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


def test_a_template_without_tools_gets_them_as_text(tools_api: Api) -> None:
    with_template(tools_api, PLAIN_TEMPLATE)
    say(tools_api, WEATHER_CALL)
    answer = tools_api.chat(tools=TOOLS).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    prompt = prompt_text(tools_api)
    assert prompt.startswith("system:You may call") and prompt.endswith(";user:hi;assistant:")
    assert '"name": "weather"' in prompt and json.dumps(CITY) in prompt
    tools_api.request("POST", "/v1/chat/completions", json={"messages": loop_messages(CALL)})
    assert prompt_text(tools_api) == (
        'user:hi;assistant:<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>;'
        "user:<tool_response>\n21 degrees\n</tool_response>;assistant:"
    )


@pytest.mark.parametrize("parser", ["auto", "hermes", "mistral", "none"])
def test_the_servers_tool_parser(tools_api: Api, parser: str) -> None:
    tools_api.config = ServerConfig(model="tiny", tool_parser=parser)
    say(tools_api, WEATHER_CALL)
    message = tools_api.chat(tools=TOOLS).json()["choices"][0]["message"]
    assert ("tool_calls" in message) == (parser in ("auto", "hermes"))
    assert "weather" in prompt_text(tools_api)
    response = tools_api.chat(tools=TOOLS, tool_choice="required")
    assert response.status_code == (400 if parser == "none" else 200)


def test_the_format_is_the_templates(tools_api: Api) -> None:
    with_template(tools_api, TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]"))
    say(tools_api, '[TOOL_CALLS][{"name": "time", "arguments": {}}]')
    (call,) = tools_api.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": "{}"}
    assert len(call["id"]) == 9 and call["id"].isalnum()  # Mistral's templates take no other ids


@pytest.mark.parametrize("stream", [True, False])
def test_a_format_of_special_tokens_is_shown_them(tools_api: Api, stream: bool) -> None:
    def message(script: str, **body: Any) -> dict[str, Any]:
        say(tools_api, script)
        response = tools_api.chat(stream=stream, **body)
        assert tools_api.client.options[-1]["skip_special_tokens"] is False
        found = joined(events(response), 0)["message"] if stream else response.json()["choices"][0]["message"]
        return {key: value for key, value in without_ids(found).items() if key not in ("role", "refusal")}

    with_template(tools_api, TEMPLATE.replace("<tool_call>", "<|channel|>"))
    thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = {"id": "", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    said = message(f"{thoughts}<|channel|>commentary to=functions.time <|constrain|>json<|message|>{{}}<|call|>", tools=TOOLS)
    assert said == {"content": None, "reasoning_content": "Hm.", "tool_calls": [call]}
    said = message(f"{thoughts}<|channel|>final<|message|>Noon.")
    assert said == {"content": "Noon.", "reasoning_content": "Hm.", "tool_calls": []}
