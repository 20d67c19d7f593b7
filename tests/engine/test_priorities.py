"""Who goes first when priorities differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.waiting_queue import LEVEL_S, MAX_LEVELS, rank
from tests.scheduler_harness import Harness, expect, prompt_of


def first_tokens(harness: Harness) -> list[str]:
    """Request ids in the order of their first tokens."""
    return [output.request_id for output in harness.outputs if output.first_token_index == 0]


@pytest.mark.parametrize("depth", [0, 1])
def test_lower_numbers_leave_the_queue_first(depth: int) -> None:
    harness = Harness(depth=depth, max_num_seqs=1)
    for name, priority in (("later", 5), ("usual", 0), ("usual too", 0), ("first", -3)):
        harness.add(name, prompt_of(5, seed=len(name)), priority=priority, max_tokens=3)
    harness.run()
    assert first_tokens(harness) == ["first", "usual", "usual too", "later"]


def test_a_prompt_that_waits_for_pages_is_passed_by_one_of_a_lower_number() -> None:
    harness = Harness(num_blocks=9, max_num_seqs=4)
    harness.add("running", prompt_of(20, seed=1), max_tokens=12)
    harness.step()
    harness.add("large", prompt_of(20, seed=2), max_tokens=4)
    harness.step()
    harness.add("urgent", prompt_of(4, seed=3), priority=-1, max_tokens=2)
    harness.run()
    assert first_tokens(harness) == ["running", "urgent", "large"]


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_are_taken_from_the_highest_number_first(depth: int) -> None:
    harness = Harness(depth=depth, num_blocks=12, max_num_seqs=4)
    prompts = {name: prompt_of(9, seed=i) for i, name in enumerate(("unimportant", "important"))}
    harness.add("unimportant", prompts["unimportant"], priority=7, max_tokens=24)
    harness.add("important", prompts["important"], priority=1, max_tokens=24)
    harness.run()
    assert harness.core.stats().preemptions > 0
    last = {output.request_id: output for output in harness.outputs if output.finish_reason}
    assert last["important"].num_preemptions == 0
    assert last["unimportant"].num_preemptions > 0
    for name, prompt in prompts.items():
        assert harness.tokens[name, 0] == expect(prompt, 24)


def test_equal_numbers_are_served_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock does not tell their arrivals apart."""
    monkeypatch.setattr("engine.scheduler.time", SimpleNamespace(monotonic=lambda: 5.0))
    harness = Harness(max_num_seqs=1)
    for i in range(6):
        harness.add(f"r{i}", prompt_of(3, seed=i), max_tokens=1)
    harness.run()
    assert first_tokens(harness) == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize(("waited_levels", "order"), [(2.9, ["new", "old"]), (3.1, ["old", "new"])])
def test_a_number_falls_while_its_request_waits(
    monkeypatch: pytest.MonkeyPatch, waited_levels: float, order: list[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("engine.scheduler.time", SimpleNamespace(monotonic=lambda: now))
    harness = Harness(max_num_seqs=1)
    harness.add("running", prompt_of(3), max_tokens=3)
    harness.step()
    harness.add("old", prompt_of(3, seed=1), priority=4, max_tokens=1)
    now += waited_levels * LEVEL_S
    harness.add("new", prompt_of(3, seed=2), priority=1, max_tokens=1)
    harness.run()
    assert first_tokens(harness) == ["running", *order]


def test_nobody_starves_behind_a_stream_of_lower_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("engine.scheduler.time", SimpleNamespace(monotonic=lambda: now))
    harness = Harness(max_num_seqs=1)
    harness.add("patient", prompt_of(3), priority=2**31 - 1, max_tokens=2)
    for i in range(2 * MAX_LEVELS):
        harness.add(f"r{i}", prompt_of(3, seed=i), max_tokens=1)
        now += LEVEL_S
        harness.step()
        if ("patient", 0) in harness.tokens:
            break
    assert MAX_LEVELS - 2 <= i <= MAX_LEVELS + 2
    harness.run()


def test_ranks() -> None:
    assert rank(10.0, 0) == 10.0
    assert rank(0.0, 1) < rank(LEVEL_S + 0.1, 0) < rank(0.0, 2)
    assert rank(0.0, MAX_LEVELS) == rank(0.0, 2**31 - 1) and rank(0.0, -MAX_LEVELS) == rank(0.0, -(2**31))
