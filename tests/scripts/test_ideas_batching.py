"""Continuous against static batching at its smallest size: steps, slots and tokens; nothing of the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ideas
import ideas_batching
import pytest


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "batching.json"
    flags = ["--device", "cpu", "--smallest", "--dtype", "float32", "--json", str(path)]
    assert ideas.run(ideas_batching.IDEA, flags) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_both_policies_give_every_token(record: dict[str, Any]) -> None:
    results = record["results"]
    for run in results["runs"]:
        assert run["output_tokens"] == round(results["mean_answer"] * results["num_requests"])
        assert len(run["stays"]) == results["num_requests"], "every request holds a slot once"


def test_only_static_batches_leave_slots_idle_while_somebody_waits(record: dict[str, Any]) -> None:
    continuous, static = ideas_batching.at_once(record["results"])
    assert continuous["idle_slot_steps"] == 0
    assert static["idle_slot_steps"] > 0.1 * static["slot_steps"]
    assert static["steps"] > continuous["steps"]
    assert static["slot_steps"] == static["steps"] * record["results"]["slots"]


def test_a_static_batch_takes_nobody_in_before_its_last_has_ended(record: dict[str, Any]) -> None:
    for run in record["results"]["runs"]:
        batches = in_batches(run["stays"])
        assert all(len(batch) <= record["results"]["slots"] for batch in batches) or run["policy"] == "continuous"
    static = ideas_batching.at_once(record["results"])[1]
    # All were there at the start, so all batches but the last are full.
    assert [len(batch) for batch in in_batches(static["stays"])] == [4, 4, 4]


def in_batches(stays: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Stays in groups that overlap in time."""
    batches: list[list[dict[str, Any]]] = []
    end = -1.0
    for stay in stays:
        if stay["start_s"] >= end:
            batches.append([])
        batches[-1].append(stay)
        end = max(end, stay["end_s"])
    return batches


def test_figures_are_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept, out = tmp_path / "batching.json", tmp_path / "pictures"
    kept.write_text(json.dumps(record))
    assert ideas.run(ideas_batching.IDEA, ["--from-json", str(kept), "--out", str(out)]) == 0
    for name in ("batching-cpu.png", "batching-timeline-cpu.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
