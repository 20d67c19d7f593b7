"""/v1/responses, field by field: each has its effect, is listed as without one, or is refused by name."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

from server.api.responses_request import ResponseRequest
from tests.server.responses_talk import WEATHER, Talk, talk


@pytest.mark.parametrize(
    ("field", "value", "name", "seen"),
    [
        ("temperature", 0.5, "temperature", 0.5),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 5, "top_k", 5),
        ("min_p", 0.5, "min_p", 0.5),
        ("typical_p", 0.5, "typical_p", 0.5),
        ("seed", 7, "seed", 7),
        ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
        ("presence_penalty", 0.5, "presence_penalty", 0.5),
        ("frequency_penalty", 0.5, "frequency_penalty", 0.5),
        ("logit_bias", {"65": 1.0}, "logit_bias", {65: 1.0}),
        ("min_tokens", 3, "min_tokens", 3),
        ("ignore_eos", True, "ignore_eos", True),
        ("stop_token_ids", [65], "stop_token_ids", (65,)),
        ("allowed_token_ids", [65], "allowed_token_ids", (65,)),
        ("bad_words", ["!"], "bad_words", ((0,),)),
    ],
)
def test_sampling(field: str, value: Any, name: str, seen: Any) -> None:
    async def steps(t: Talk) -> None:
        response = await t.create(**{field: value})
        assert getattr(t.client.sampling[-1], name) == seen
        assert response.get(field, value) == value  # temperature and top_p are repeated

    talk(steps)


def test_how_the_text_is_made() -> None:
    async def steps(t: Talk) -> None:
        await t.create(
            stop="x",
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            cache_salt="s",
            priority=3,
            spaces_between_special_tokens=True,
        )
        assert t.client.stops[-1] == ["x"]
        assert t.client.options[-1] == {
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": True,
            "cache_salt": "s",
            "priority": 3,
        }
        await t.create(truncate_prompt_tokens=5)
        assert len(t.client.prompts[-1]) == 5
        assert (await t.create(request_id="mine"))["id"] == "resp_mine"

    talk(steps)


def test_the_answer_repeats_what_was_asked() -> None:
    asked: dict[str, Any] = {
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [WEATHER],
        "truncation": "auto",
        "reasoning": {"effort": "low"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "text": {"format": {"type": "json_object"}},
        "store": False,
    }

    async def steps(t: Talk) -> None:
        answer = await t.post(**asked)
        response = answer.json()
        reasoning = response.pop("reasoning")
        assert {name: response[name] for name in asked if name != "reasoning"} == {
            name: value for name, value in asked.items() if name != "reasoning"
        }
        assert reasoning["effort"] == "low"
        listed = answer.headers["X-Octavo-Ignored-Fields"].split(", ")
        assert sorted(listed) == ["max_tool_calls", "prompt_cache_key", "safety_identifier", "user"]

    talk(steps)


def test_metadata_has_bounds() -> None:
    async def steps(t: Talk) -> None:
        for wrong in ({"a": 1}, {"k" * 65: ""}, {"k": "v" * 513}, {str(index): "" for index in range(17)}):
            param, _ = await t.refused(metadata=wrong)
            assert param is not None and param.startswith("metadata")

    talk(steps)


REFUSED: dict[str, Any] = {
    "access_programs": {"cyber": "standard"},
    "background": True,
    "background_options": {},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "moderation": {"model": "m"},
    "prompt": {"id": "p"},
    "messages": [{"role": "user", "content": "x"}],
    "n": 2,
    "max_tokens": 5,
    "logprobs": True,
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
}
WITHOUT_EFFECT: dict[str, Any] = {
    "image": {"context_compression": "auto"},
    "max_tool_calls": 1,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
    "user": "u",
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_what_is_refused_by_name(field: str, value: Any) -> None:
    async def steps(t: Talk) -> None:
        assert await t.refused(**{field: value}) == (field, "unsupported_parameter")

    talk(steps)


def test_what_asks_for_nothing_is_accepted() -> None:
    async def steps(t: Talk) -> None:
        answer = await t.post(background=False, context_management=[], n=1, conversation=None, prompt=None, tools=[])
        assert answer.status_code == 200 and "X-Octavo-Ignored-Fields" not in answer.headers

    talk(steps)


def test_what_has_no_effect_is_listed_also_in_strict_mode() -> None:
    async def steps(t: Talk) -> None:
        answer = await t.post(**WITHOUT_EFFECT)
        assert answer.status_code == 200
        assert sorted(answer.headers["X-Octavo-Ignored-Fields"].split(", ")) == sorted(WITHOUT_EFFECT)
        answer = await t.post(stream=True, stream_options={"include_obfuscation": False})
        assert answer.headers["X-Octavo-Ignored-Fields"] == "stream_options.include_obfuscation"

    talk(steps, strict=True)


def test_every_field_of_the_specification_is_known() -> None:
    known = {*ResponseRequest.model_fields, *ResponseRequest.UNSUPPORTED, *ResponseRequest.WITHOUT_EFFECT}
    assert set(get_type_hints(ResponseCreateParamsNonStreaming)) - known == set()
    assert not ResponseRequest.UNSUPPORTED.keys() & ResponseRequest.WITHOUT_EFFECT
    assert set(WITHOUT_EFFECT) <= ResponseRequest.WITHOUT_EFFECT and set(REFUSED) <= ResponseRequest.UNSUPPORTED.keys()
