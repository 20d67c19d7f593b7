"""The store of responses: bounds in number and bytes, chains, references."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from engine.errors import InvalidRequest
from server.api.response_store import ResponseStore, StoredResponse
from server.api.responses_types import InputText, Item, MessageItem, OutputText, Reasoning, ResponseObject
from server.errors import NotFound


def response(name: str, text: str = "answer") -> ResponseObject:
    fields: dict[str, Any] = dict.fromkeys(
        ("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key"), None
    )
    return ResponseObject(
        **fields,
        id=name,
        created_at=1,
        metadata={},
        model="m",
        output=[MessageItem(id=f"msg_{name}", role="assistant", content=[OutputText(text)])],
        parallel_tool_calls=True,
        reasoning=Reasoning(),
        safety_identifier=None,
        store=True,
        temperature=1.0,
        text={},
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
        truncation="disabled",
        user=None,
    )


def said(name: str, text: str = "question") -> list[Item]:
    return [MessageItem(id=f"in_{name}", role="user", content=[InputText(text)])]


def ids(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def counted_bytes(store: ResponseStore, turns: list[StoredResponse]) -> int:
    """Of all turns that can be reached from an id."""
    reached = {}
    for turn in turns:
        at: StoredResponse | None = turn
        while at is not None:
            reached[id(at)] = at.num_bytes
            at = at.previous
    return sum(reached.values())


def test_a_conversation_is_all_turns_in_order() -> None:
    store = ResponseStore(10)
    mine = store.of("me")
    mine.put(response("a"), said("a"), None)
    mine.put(response("b"), said("b"), mine.get("a"))
    turn = mine.get("b")
    assert ids(turn.conversation()) == ["in_a", "msg_a", "in_b", "msg_b"]
    assert ids(turn.input_context()) == ["in_a", "msg_a", "in_b"]
    assert mine.item("msg_a") is turn.conversation()[1]


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(2)
    mine = store.of("me")
    for name in "ab":
        mine.put(response(name), said(name), None)
    mine.get("a")
    mine.put(response("c"), said("c"), None)
    assert len(store) == 2 and mine.get("a") and mine.get("c")
    with pytest.raises(NotFound):
        mine.get("b")
    assert mine.item("msg_b") is None


def test_bytes_are_bounded_too() -> None:
    one = StoredResponse(response("a", "x" * 1000), said("a"), None).num_bytes
    store = ResponseStore(100, max_bytes=3 * one)
    mine = store.of("me")
    for name in "abcdefgh":
        mine.put(response(name, "x" * 1000), said(name), None)
        assert store.num_bytes <= 3 * one
    assert len(store) == 3 and mine.get("h")


def test_what_alone_is_too_large_pushes_nothing_out() -> None:
    store = ResponseStore(100, max_bytes=20_000)
    mine = store.of("me")
    mine.put(response("a"), said("a"), None)
    mine.put(response("b", "x" * 30_000), said("b"), None)
    assert len(store) == 1 and mine.get("a")


def test_size_zero_stores_nothing() -> None:
    store = ResponseStore(0)
    mine = store.of("me")
    mine.put(response("a"), said("a"), None)
    assert len(store) == 0 and store.num_bytes == 0


def test_an_id_that_comes_again_stands_for_the_later_response() -> None:
    store = ResponseStore(10)
    mine = store.of("me")
    for text in ("first", "second"):
        mine.put(response("a", text), said("a"), None)
    assert mine.get("a").response.output[0].content == [OutputText("second")]  # type: ignore[union-attr]
    assert len(store) == 1 and store.num_bytes == mine.get("a").num_bytes
    assert mine.item("msg_a") is mine.get("a").response.output[0]


def test_a_deleted_turn_is_kept_while_a_later_one_needs_it() -> None:
    store = ResponseStore(10)
    mine = store.of("me")
    mine.put(response("a"), said("a"), None)
    mine.put(response("b"), said("b"), mine.get("a"))
    mine.delete("a")
    with pytest.raises(InvalidRequest) as error:
        mine.previous("a")
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")
    assert ids(mine.get("b").conversation())[:2] == ["in_a", "msg_a"] and mine.item("msg_a") is not None
    mine.delete("b")
    assert store.num_bytes == 0 and mine.item("msg_a") is None and mine.item("msg_b") is None


def test_a_turn_pushed_out_while_the_next_one_was_made_counts_again() -> None:
    store = ResponseStore(10)
    mine = store.of("me")
    mine.put(response("a"), said("a"), None)
    previous = mine.get("a")
    mine.delete("a")
    mine.put(response("b"), said("b"), previous)
    assert store.num_bytes == mine.get("b").chain_bytes


@pytest.mark.parametrize("seed", range(5))
def test_bytes_counted_are_the_bytes_reachable(seed: int) -> None:
    draw = random.Random(seed)
    store = ResponseStore(12, max_bytes=40_000)
    mine = store.of("me")
    names: list[str] = []
    for step in range(300):
        alive = [name for name in names if ("me", name) in store]
        if alive and draw.random() < 0.2:
            mine.delete(draw.choice(alive))
        else:
            previous = mine.get(draw.choice(alive)) if alive and draw.random() < 0.7 else None
            mine.put(response(str(step), "x" * draw.randrange(3000)), said(str(step)), previous)
            names.append(str(step))
        alive = [name for name in names if ("me", name) in store]
        assert len(store) == len(alive) <= 12
        assert store.num_bytes == counted_bytes(store, [mine.get(name) for name in alive]) <= 40_000


def test_sizes_are_those_of_the_json() -> None:
    turn = StoredResponse(response("a"), said("a"), None)
    assert turn.num_bytes == len(msgspec.json.encode(turn.response)) + len(msgspec.json.encode(turn.input_items))


def test_nobody_sees_replaces_or_deletes_what_is_anothers() -> None:
    store = ResponseStore(10)
    mine, yours = store.of("me"), store.of("you")
    mine.put(response("a", "mine"), said("a"), None)
    for look in (yours.get, yours.delete):
        with pytest.raises(NotFound):
            look("a")
    with pytest.raises(InvalidRequest):
        yours.previous("a")
    assert yours.item("msg_a") is None
    yours.put(response("a", "yours"), said("a"), None)
    assert mine.get("a").response.output[0].content == [OutputText("mine")]  # type: ignore[union-attr]
    yours.delete("a")
    assert mine.get("a") and mine.item("msg_a") and len(store) == 1
