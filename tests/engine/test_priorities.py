"""Who goes first when priorities differ."""

from __future__ import annotations

import pytest

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
