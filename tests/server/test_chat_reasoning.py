"""/v1/chat/completions of a model that thinks: its thoughts apart from its answer, and grammars that wait for their end."""

from __future__ import annotations

from typing import Any

import pytest

from engine.sampling_params import StructuredSpec
from server.config import ServerConfig
from tests.server.conftest import Api, events
from tests.server.test_chat_tools import accepts, joined, prompt_text, say, with_template

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %};{% endfor %}"
    "{% if reasoning_effort %}effort:{{ reasoning_effort }};{% endif %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is false %}<think></think>{% endif %}"
    "{% if start_thinking %}<think>{% endif %}{% endif %}"
)
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}


@pytest.fixture
def thinker(api: Api) -> Api:
    with_template(api, TEMPLATE)
    say(api, "<think>\nHm, 3?\n</think>\n\n3")
    return api


def message(api: Api, **body: Any) -> dict[str, Any]:
    response = api.chat(**body)
    found = joined(events(response), 0)["message"] if body.get("stream") else response.json()["choices"][0]["message"]
    return {key: value for key, value in found.items() if key not in ("role", "refusal")}


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_are_not_content(thinker: Api, stream: bool) -> None:
    assert message(thinker, stream=stream) == {"content": "3", "reasoning_content": "Hm, 3?"}
    assert message(thinker, stream=stream, include_reasoning=False) == {"content": "3"}
    assert message(thinker, stream=stream, max_tokens=11) == {"content": None, "reasoning_content": "Hm,"}
    thinker.config = ServerConfig(model="tiny", reasoning_parser="none")
    assert message(thinker, stream=stream) == {"content": "<think>\nHm, 3?\n</think>\n\n3"}


def test_streamed_thoughts_come_as_they_are_thought(thinker: Api) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in events(thinker.chat(stream=True))]
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta][:3] == ["H", "m", ","]
    assert deltas[-1] == {"content": "3"}


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_that_the_template_began(thinker: Api, stream: bool) -> None:
    say(thinker, "Hm.</think>3")
    given = {"chat_template_kwargs": {"start_thinking": True}}
    assert message(thinker, stream=stream, **given) == {"content": "3", "reasoning_content": "Hm."}


@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_are_counted(thinker: Api, stream: bool) -> None:
    def usage(**body: Any) -> dict[str, Any]:
        if not stream:
            return thinker.chat(**body).json()["usage"]  # type: ignore[no-any-return]
        return events(thinker.chat(stream=True, stream_options={"include_usage": True}, **body))[-1]["usage"]  # type: ignore[no-any-return]

    thoughts = len("<think>\nHm, 3?\n</think>\n\n")
    assert usage()["completion_tokens_details"] == {"reasoning_tokens": thoughts}
    assert usage(include_reasoning=False, n=2)["completion_tokens_details"] == {"reasoning_tokens": 2 * thoughts}
    assert usage(max_tokens=10)["completion_tokens_details"] == {"reasoning_tokens": 10}
    say(thinker, "3")
    assert usage()["completion_tokens_details"] == {"reasoning_tokens": 0}
    with_template(thinker, "x")
    assert "completion_tokens_details" not in usage()


def test_an_answer_is_constrained_after_its_thoughts(thinker: Api) -> None:
    thinker.chat(response_format=SCHEMA)
    structured = thinker.client.sampling[-1].structured
    assert structured is not None and structured.kind == "lark"
    assert accepts(structured.text, "<think>\nHm, 3?\n</think>\n\n{}") and accepts(structured.text, "{}")
    assert not accepts(structured.text, "Hm, 3? {}")
    thinker.chat(response_format=SCHEMA, chat_template_kwargs={"start_thinking": True})
    structured = thinker.client.sampling[-1].structured
    assert structured is not None and accepts(structured.text, "Hm.</think>{}") and not accepts(structured.text, "{}")
    thinker.config = ServerConfig(model="tiny", reasoning_parser="none")
    thinker.chat(structured_outputs={"choice": ["a", "b"]})
    assert thinker.client.sampling[-1].structured == StructuredSpec("choice", '["a", "b"]')


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_reasoning_effort_is_the_templates(thinker: Api, effort: str) -> None:
    thinker.chat(reasoning_effort=effort)
    end = "<think></think>" if effort == "none" else ""
    assert prompt_text(thinker) == f"user:hi;effort:{effort};assistant:{end}"
    thinker.chat(reasoning_effort=effort, chat_template_kwargs={"enable_thinking": True, "reasoning_effort": "own"})
    assert prompt_text(thinker) == "user:hi;effort:own;assistant:"
    assert thinker.chat(reasoning_effort="much").status_code == 400


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_go_back_to_the_template(thinker: Api, field: str) -> None:
    messages = [{"role": "assistant", "content": "3", field: "Hm."}, {"role": "user", "content": "Sure?"}]
    assert thinker.request("POST", "/v1/chat/completions", json={"messages": messages}).status_code == 200
    assert prompt_text(thinker) == "assistant:3<think>Hm.</think>;user:Sure?;assistant:"
