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
    store.put(response("a"), said("a"), None)
    store.put(response("b"), said("b"), store.get("a"))
    turn = store.get("b")
    assert ids(turn.conversation()) == ["in_a", "msg_a", "in_b", "msg_b"]
    assert ids(turn.input_context()) == ["in_a", "msg_a", "in_b"]
    assert store.item("msg_a") is turn.conversation()[1]


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(2)
    for name in "ab":
        store.put(response(name), said(name), None)
    store.get("a")
    store.put(response("c"), said("c"), None)
    assert len(store) == 2 and store.get("a") and store.get("c")
    with pytest.raises(NotFound):
        store.get("b")
    assert store.item("msg_b") is None


def test_bytes_are_bounded_too() -> None:
    one = StoredResponse(response("a", "x" * 1000), said("a"), None).num_bytes
    store = ResponseStore(100, max_bytes=3 * one)
    for name in "abcdefgh":
        store.put(response(name, "x" * 1000), said(name), None)
        assert store.num_bytes <= 3 * one
    assert len(store) == 3 and store.get("h")


def test_what_alone_is_too_large_pushes_nothing_out() -> None:
    store = ResponseStore(100, max_bytes=20_000)
    store.put(response("a"), said("a"), None)
    store.put(response("b", "x" * 30_000), said("b"), None)
    assert len(store) == 1 and store.get("a")


def test_size_zero_stores_nothing() -> None:
    store = ResponseStore(0)
    store.put(response("a"), said("a"), None)
    assert len(store) == 0 and store.num_bytes == 0


def test_an_id_that_comes_again_stands_for_the_later_response() -> None:
    store = ResponseStore(10)
    for text in ("first", "second"):
        store.put(response("a", text), said("a"), None)
    assert store.get("a").response.output[0].content == [OutputText("second")]  # type: ignore[union-attr]
    assert len(store) == 1 and store.num_bytes == store.get("a").num_bytes
    assert store.item("msg_a") is store.get("a").response.output[0]


def test_a_deleted_turn_is_kept_while_a_later_one_needs_it() -> None:
    store = ResponseStore(10)
    store.put(response("a"), said("a"), None)
    store.put(response("b"), said("b"), store.get("a"))
    store.delete("a")
    with pytest.raises(InvalidRequest) as error:
        store.previous("a")
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")
    assert ids(store.get("b").conversation())[:2] == ["in_a", "msg_a"] and store.item("msg_a") is not None
    store.delete("b")
    assert store.num_bytes == 0 and store.item("msg_a") is None and store.item("msg_b") is None


def test_a_turn_pushed_out_while_the_next_one_was_made_counts_again() -> None:
    store = ResponseStore(10)
    store.put(response("a"), said("a"), None)
    previous = store.get("a")
    store.delete("a")
    store.put(response("b"), said("b"), previous)
    assert store.num_bytes == store.get("b").chain_bytes


@pytest.mark.parametrize("seed", range(5))
def test_bytes_counted_are_the_bytes_reachable(seed: int) -> None:
    draw = random.Random(seed)
    store = ResponseStore(12, max_bytes=40_000)
    names: list[str] = []
    for step in range(300):
        alive = [name for name in names if name in store]
        if alive and draw.random() < 0.2:
            store.delete(draw.choice(alive))
        else:
            previous = store.get(draw.choice(alive)) if alive and draw.random() < 0.7 else None
            store.put(response(str(step), "x" * draw.randrange(3000)), said(str(step)), previous)
            names.append(str(step))
        alive = [name for name in names if name in store]
        assert len(store) == len(alive) <= 12
        assert store.num_bytes == counted_bytes(store, [store.get(name) for name in alive]) <= 40_000


def test_sizes_are_those_of_the_json() -> None:
    turn = StoredResponse(response("a"), said("a"), None)
    assert turn.num_bytes == len(msgspec.json.encode(turn.response)) + len(msgspec.json.encode(turn.input_items))
