"""Paging's figures at their smallest size: shares of memory, steps and pages; nothing of the clock. And the buddies."""

from __future__ import annotations

import json
import random
from typing import Any

import ideas
import ideas_paging
import pytest
from ideas_contiguous import BuddyAllocator


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "paging.json"
    assert ideas.run(ideas_paging.IDEA, ["--device", "cpu", "--smallest", "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())["results"]
    return figures


@pytest.fixture(scope="module")
def policies(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["policy"]: record for record in results["policies"]}


def test_the_shares_are_all_of_the_memory(policies: dict[str, dict[str, Any]]) -> None:
    for record in policies.values():
        assert sum(record["shares"].values()) == pytest.approx(1.0)
        assert min(record["shares"].values()) >= 0
    assert len({record["output_tokens"] for record in policies.values()}) == 1, "the same answers"


def test_room_for_the_longest_lets_as_many_run_as_that_fits(
    policies: dict[str, dict[str, Any]], results: dict[str, Any]
) -> None:
    slots = results["capacity"] // ideas_paging.MAX_MODEL_LEN
    worst = policies["contiguous, max"]
    assert worst["mean_running"] == worst["most_running"] == slots
    assert worst["shares"]["free"] == 0 and worst["preemptions"] == 0


def test_pages_hold_more_the_smaller_they_are(policies: dict[str, dict[str, Any]]) -> None:
    by_size = [policies[f"paged, {size}"] for size in ideas_paging.BLOCK_SIZES]
    stored = [record["shares"]["stored"] for record in by_size]
    assert stored == sorted(stored, reverse=True)
    assert policies["paged, 16"]["shares"]["stored"] > 0.9
    assert policies["contiguous, max"]["shares"]["stored"] < policies["contiguous, exact"]["shares"]["stored"] < stored[-1]
    assert policies["paged, 16"]["steps"] < policies["contiguous, exact"]["steps"] < policies["contiguous, max"]["steps"]


def test_what_a_page_wastes_is_in_the_last_one(policies: dict[str, dict[str, Any]], results: dict[str, Any]) -> None:
    for size in ideas_paging.BLOCK_SIZES:
        record = policies[f"paged, {size}"]
        unfilled = (record["shares"]["reserved"] + record["shares"]["unused"]) * results["capacity"]
        assert unfilled < record["mean_running"] * size


def test_the_model_ran_the_same_load_in_fewer_steps(policies: dict[str, dict[str, Any]]) -> None:
    timed = [record for record in policies.values() if "timed_steps" in record]
    assert {record["policy"] for record in timed} == {"contiguous, max", "contiguous, exact", "paged, 16"}
    assert len({record["timed_tokens"] for record in timed}) == 1


def test_sharing(results: dict[str, Any]) -> None:
    prefix, choices = results["sharing"]
    # 8 requests of 512 + 64 tokens and 31 more in the cache: 38 pages each, of which 32 are alike.
    assert prefix["apart"]["pages"] == 8 * 38
    assert prefix["shared"]["pages"] == 32 + 8 * 6
    assert prefix["apart"]["prompt_tokens"] == 8 * 576
    assert prefix["shared"]["prompt_tokens"] == 512 + 8 * 64
    # 4 choices of 63 more tokens: 4 pages each.
    assert choices["apart"]["pages"] == 4 * 36
    assert choices["shared"]["pages"] == 32 + 4 * 4
    assert choices["shared"]["prompt_tokens"] == 512


def test_buddies_never_overlap_and_come_together_again() -> None:
    generator, buddies, held = random.Random(0), BuddyAllocator(64), {}
    for _ in range(2000):
        order = generator.randrange(5)
        if held and (generator.random() < 0.5 or not buddies.has(order)):
            start = generator.choice(list(held))
            buddies.free(start, held.pop(start))
        elif buddies.has(order):
            start = buddies.allocate(order)
            assert start % (1 << order) == 0
            held[start] = order
        pages = [page for start, order in held.items() for page in range(start, start + (1 << order))]
        assert len(pages) == len(set(pages)) and all(0 <= page < 64 for page in pages)
    for start, order in held.items():
        buddies.free(start, order)
    assert buddies.has(6) and [BuddyAllocator.order(count) for count in (1, 2, 3, 4, 5, 64)] == [0, 1, 2, 2, 3, 6]
