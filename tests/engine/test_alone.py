"""A request in whose steps engines have died runs by itself until one of its steps has completed."""

from __future__ import annotations

import pytest

from engine.step import SchedulerOutput
from tests.scheduler_harness import Harness, expect, prompt_of


def num_rows(harness: Harness) -> list[int]:
    return [len(step.slots) for step in harness.runner.steps]


def first_step_of(harness: Harness, prompt: list[int]) -> int:
    """The number of the step that a prompt is begun in."""
    return next(
        i
        for i, step in enumerate(harness.runner.steps)
        if any(row.token_ids.tolist()[: len(prompt)] == prompt for row in step.new_rows)
    )


@pytest.mark.parametrize("depth", [0, 1])
def test_its_first_step_is_its_own(depth: int) -> None:
    harness = Harness(depth=depth)
    prompts = {name: prompt_of(6, seed=i) for i, name in enumerate(("before", "suspect", "after"))}
    harness.add("before", prompts["before"], max_tokens=30)
    for _ in range(4):
        harness.step()
    harness.add("suspect", prompts["suspect"], alone=True, max_tokens=10)
    harness.add("after", prompts["after"], max_tokens=10)
    harness.run()
    step = first_step_of(harness, prompts["suspect"])
    assert num_rows(harness)[step] == 1
    assert num_rows(harness)[step + 1] > 1  # and then it is one of many
    assert first_step_of(harness, prompts["after"]) > step
    for name, count in (("before", 30), ("suspect", 10), ("after", 10)):
        assert harness.tokens[name, 0] == expect(prompts[name], count)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 40])
def test_nothing_else_is_in_flight_with_it(depth: int, max_tokens: int) -> None:
    harness = Harness(depth=depth)
    plan, seen = harness.scheduler.schedule, []

    def schedule() -> SchedulerOutput | None:
        step = plan()
        flights = [{request.request_id for request in flight.rows} for flight in harness.scheduler._in_flight]
        if any(flight.is_alone for flight in harness.scheduler._in_flight):
            seen.append(flights)
        return step

    harness.scheduler.schedule = schedule  # type: ignore[method-assign]
    harness.add("other", prompt_of(6), max_tokens=max_tokens)
    harness.step()
    harness.add("suspect", prompt_of(40, seed=1), alone=True, max_tokens=4)
    harness.run()
    assert seen and all(flights == [{"suspect"}] for flights in seen)


@pytest.mark.parametrize("depth", [0, 1])
def test_several_go_one_after_the_other(depth: int) -> None:
    harness = Harness(depth=depth, max_num_batched_tokens=64)
    prompts = [prompt_of(6, seed=i) for i in range(5)]
    for i, prompt in enumerate(prompts):
        harness.add(f"r{i}", prompt, alone=i != 2)
    harness.run()
    for i, prompt in enumerate(prompts):
        assert harness.tokens[f"r{i}", 0] == expect(prompt, 8)
        if i != 2:
            assert num_rows(harness)[first_step_of(harness, prompt)] == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_its_choices_fork_in_that_step(depth: int) -> None:
    harness = Harness(depth=depth)
    harness.add("other", prompt_of(6), max_tokens=20)
    harness.step()
    prompt = prompt_of(6, seed=1)
    harness.add("suspect", prompt, alone=True, n=3, max_tokens=6)
    harness.run()
    step = harness.runner.steps[first_step_of(harness, prompt)]
    assert len(step.slots) == 1 and len(step.forks) == 2
    for choice in range(3):
        assert harness.tokens["suspect", choice] == expect(prompt, 6, choice=choice)


@pytest.mark.parametrize("depth", [0, 1])
def test_choices_that_bring_output(depth: int) -> None:
    harness = Harness(depth=depth)
    prompt = prompt_of(6)
    known = [expect(prompt, 3, choice=choice) for choice in range(2)]
    harness.add("other", prompt_of(6, seed=1), max_tokens=20)
    harness.step()
    harness.add("suspect", prompt, alone=True, n=2, output=known, max_tokens=9)
    harness.run()
    assert num_rows(harness)[first_step_of(harness, prompt + known[0])] == 1
    assert num_rows(harness)[first_step_of(harness, prompt + known[1])] > 1  # the request is no suspect any more
    for choice in range(2):
        assert harness.tokens["suspect", choice] == expect(prompt, 9, choice=choice)


@pytest.mark.parametrize("depth", [0, 1])
def test_it_waits_for_a_slot_like_others(depth: int) -> None:
    harness = Harness(depth=depth, max_num_seqs=2)
    for i in range(2):
        harness.add(f"r{i}", prompt_of(6, seed=i), max_tokens=12)
    harness.add("suspect", prompt_of(6, seed=2), alone=True)
    harness.run()
    assert harness.tokens["suspect", 0] == expect(prompt_of(6, seed=2), 8)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_one_that_is_aborted_holds_nobody_up(depth: int, num_steps: int) -> None:
    harness = Harness(depth=depth)
    harness.add("other", prompt_of(6), max_tokens=20)
    harness.step()
    harness.add("suspect", prompt_of(40, seed=1), alone=True)
    for _ in range(num_steps):
        harness.step()
    harness.core.abort("suspect")
    harness.run()
    assert harness.tokens["other", 0] == expect(prompt_of(6), 20)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fails_late", [False, True])
def test_a_step_of_its_own_that_does_not_fit(depth: int, fails_late: bool) -> None:
    harness = Harness(depth=depth)
    harness.runner.fails_late = fails_late
    refused = []

    def too_large(step: object) -> bool:
        flight = harness.scheduler._in_flight[-1]
        if flight.is_alone and not refused:
            refused.append(step)
        return bool(refused) and refused[-1] is step

    harness.runner.out_of_memory = too_large
    harness.add("other", prompt_of(6), max_tokens=20)
    harness.step()
    harness.add("suspect", prompt_of(6, seed=1), alone=True)
    harness.run()
    assert refused
    assert harness.tokens["suspect", 0] == expect(prompt_of(6, seed=1), 8)
    assert harness.tokens["other", 0] == expect(prompt_of(6), 20)
