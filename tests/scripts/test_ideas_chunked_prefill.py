"""Chunked prefill at its smallest size: steps, tokens and texts; nothing of the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ideas
import ideas_chunked_prefill
import pytest

FLAGS = ["--device", "cpu", "--smallest", "--dtype", "float32"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "chunked_prefill.json"
    assert ideas.run(ideas_chunked_prefill.IDEA, [*FLAGS, "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_no_step_is_larger_than_the_side_allows(record: dict[str, Any]) -> None:
    results = record["results"]
    *chunked, whole = results["runs"]
    assert [run["tokens_a_step"] for run in chunked] == [16, 48]
    for run in chunked:
        assert run["largest_step"] <= run["tokens_a_step"] < results["prompt_tokens"]
    # A whole prompt, and a token for everybody who runs.
    assert whole["largest_step"] >= results["prompt_tokens"] + results["num_running"]
    assert [run["side"] for run in results["runs"]] == ["16", "48", "whole"]


def test_smaller_steps_are_more_steps(record: dict[str, Any]) -> None:
    steps = [run["steps"] for run in record["results"]["runs"]]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == len(steps)


def test_all_sides_compute_the_same_tokens_and_say_the_same(record: dict[str, Any]) -> None:
    results = record["results"]
    num_requests = results["num_running"] + results["num_prompts"]
    long_answers = results["num_prompts"] * ideas_chunked_prefill.LONG_ANSWER
    output_tokens = results["num_running"] * results["num_tokens"] + long_answers
    prompts = results["num_running"] * ideas_chunked_prefill.SHORT_PROMPT + results["num_prompts"] * results["prompt_tokens"]
    for run in results["runs"]:
        assert run["output_tokens"] == output_tokens
        # Each request's last token is not computed any more.
        assert run["computed_tokens"] == prompts + output_tokens - num_requests
        assert run["equal_texts"] == num_requests
        assert len(run["ttft_s"]) == results["num_prompts"]


@pytest.mark.parametrize("chunks", [["4"], ["96", "512"]])
def test_chunks_that_are_none_are_refused(chunks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ideas.run(ideas_chunked_prefill.IDEA, [*FLAGS, "--chunks", *chunks]) == 2
    said = capsys.readouterr().err
    assert "--chunks must be between 5 (a token for everybody) and 127 (less than a whole prompt of 90 tokens)" in said
    assert f"got {', '.join(chunks)}" in said


def test_figures_are_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept, out = tmp_path / "chunked_prefill.json", tmp_path / "pictures"
    # With a side as on a GPU, whose steps grow by the engine's rule.
    rule = record["results"]["runs"][1] | {"side": "rule", "mixed_tokens_a_step": 1024, "is_default": True}
    record["results"]["runs"].insert(2, rule)
    kept.write_text(json.dumps(record))
    assert ideas.run(ideas_chunked_prefill.IDEA, ["--from-json", str(kept), "--out", str(out)]) == 0
    for name in ("chunked-prefill-cpu.png", "chunked-prefill-trade-off-cpu.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
