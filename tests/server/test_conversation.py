"""Replies as they are read: however many tokens the engine's outputs hold, and whatever their text was split into."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.request_stream import ChoiceDelta
from tests.server.conftest import Api, events
from tests.server.fake_client import FakeStream
from tests.server.test_chat_tools import SCRIPTS, THINKING_TEMPLATE, TOOLS, joined, say, with_template, without_ids


def join_turns(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let streams give `size` turns at once, as those of a reader that is behind do."""
    run = FakeStream._run

    async def in_groups(stream: FakeStream) -> AsyncIterator[list[ChoiceDelta]]:
        held: list[ChoiceDelta] = []
        num_held = 0
        async for deltas in run(stream):
            for delta in deltas:
                earlier = next((other for other in held if other.choice_index == delta.choice_index), None)
                if earlier is None:
                    delta.token_ids = [*delta.token_ids]  # the fake's choices share theirs
                    held.append(delta)
                else:
                    earlier.extend(delta)
            num_held += 1
            if num_held == size:
                yield held
                held, num_held = [], 0
        if held:
            yield held

    monkeypatch.setattr(FakeStream, "_run", in_groups)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("size", [2, 7, 1000])
def test_however_many_tokens_come_at_once(api: Api, monkeypatch: pytest.MonkeyPatch, script: str, size: int) -> None:
    with_template(api, THINKING_TEMPLATE)
    say(api, script)
    body: dict[str, Any] = {"tools": TOOLS, "n": 2, "logprobs": True, "return_token_ids": True}
    expected = api.chat(**body).json()
    join_turns(monkeypatch, size)
    whole = api.chat(**body).json()
    chunks = events(api.chat(**body, stream=True, stream_options={"include_usage": True}))
    usage = chunks.pop()["usage"]
    for choice, got in zip(expected["choices"], whole["choices"], strict=True):
        streamed = joined(chunks, choice["index"])
        assert without_ids(streamed["message"]) == without_ids(got["message"]) == without_ids(choice["message"])
        assert streamed["finish_reason"] == got["finish_reason"] == choice["finish_reason"]
        assert got["logprobs"] == choice["logprobs"] and got["token_ids"] == choice["token_ids"]
    for counted in (usage, whole["usage"]):
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert counted[name] == expected["usage"][name]


@pytest.mark.parametrize("size", [1, 3, 4, 1000])
def test_thoughts_are_counted_however_they_come(api: Api, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    with_template(api, THINKING_TEMPLATE)
    say(api, "<think>\nHm, 3?\n</think>\n\n3")
    join_turns(monkeypatch, size)
    details = api.chat().json()["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": len("<think>\nHm, 3?\n</think>\n\n")}
