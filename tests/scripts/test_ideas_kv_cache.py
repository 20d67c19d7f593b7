"""The KV cache's figures at their smallest size: what is computed, and bytes; nothing of the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ideas
import ideas_kv_cache
import pytest


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "kv.json"
    assert ideas.run(ideas_kv_cache.IDEA, ["--device", "cpu", "--smallest", "--dtype", "float32", "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_without_the_cache_every_token_computes_all_before_it(record: dict[str, Any]) -> None:
    for point in record["results"]["points"]:
        kept, anew = point["with"], point["without"]
        assert kept["computed_tokens"] == point["length"] + kept["output_tokens"] - 1
        assert anew["computed_tokens"] == sum(point["length"] + i for i in range(anew["output_tokens"]))
        assert anew["steps"] == anew["output_tokens"], "a step computes all of a token's sequence"
        # The preemption after the last token never comes: the request has ended.
        assert (kept["preemptions"], anew["preemptions"]) == (0, anew["output_tokens"] - 1)


def test_both_sides_say_the_same(record: dict[str, Any]) -> None:
    for point in record["results"]["points"]:
        assert point["equal_tokens"] == point["without"]["output_tokens"]


def test_bytes_of_a_token(record: dict[str, Any]) -> None:
    results = record["results"]
    # llama-tiny: 2 layers, keys and values, 2 heads of 16, float32.
    assert results["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    by_model = {row["model"]: row for row in results["models"]}
    assert by_model["Llama-3.1-8B"]["bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    assert by_model["Llama-3.1-8B"]["sequence_bytes"][0] == 1 << 30
    assert by_model["Llama-2-7B"]["bytes_per_token"] == 4 * by_model["Llama-3.1-8B"]["bytes_per_token"]
    half = by_model["gpt-oss-20b"]
    assert half["sequence_bytes"][1] == half["bytes_per_token"] // 2 * (131072 + 128)


def test_figures_are_drawn_elsewhere(record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    kept, out = tmp_path / "kv.json", tmp_path / "pictures"
    kept.write_text(json.dumps(record))
    page = tmp_path / "pictures.md"
    page.write_text("before\n<!-- figures: kv-cache cpu -->\nof yesterday\n<!-- end -->\nafter\n")
    assert ideas.run(ideas_kv_cache.IDEA, ["--from-json", str(kept), "--out", str(out)]) == 0
    assert (out / "kv-cache-cpu.png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert text.startswith("before\n<!-- figures: kv-cache cpu -->\n") and text.endswith("\n<!-- end -->\nafter\n")
    assert "of yesterday" not in text and "pictures/kv-cache-cpu.png" in text and record["machine"] in text
    assert ".venv/bin/python scripts/ideas_kv_cache.py --device cpu --smallest --dtype float32" in text
    assert record["machine"] in capsys.readouterr().out
