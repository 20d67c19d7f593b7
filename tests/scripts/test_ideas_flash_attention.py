"""Flash attention's figures at their smallest size: bytes, errors and steps; nothing of the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ideas
import ideas_flash_attention
import ideas_memory
import pytest
import torch
from ideas_flash_report import found, saving


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "flash.json"
    assert ideas.run(ideas_flash_attention.IDEA, ["--device", "cpu", "--smallest", "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())["results"]
    return figures


def peak(results: dict[str, Any], **keys: Any) -> int:
    record = found(results["cases"], **keys)
    assert record is not None
    return int(record["peak_bytes"])


@pytest.mark.parametrize("shape", ["2x16", "4x32"])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_memory_grows_linearly_and_standard_memory_with_the_square(
    results: dict[str, Any], shape: str, causal: bool
) -> None:
    heads, dim = map(int, shape.split("x"))
    short, long = ({"shape": shape, "causal": causal, "length": length} for length in (512, 1024))
    assert peak(results, kind="standard", **long) == pytest.approx(4 * peak(results, kind="standard", **short), rel=0.05)
    assert peak(results, kind="standard", **long) >= 2 * heads * 1024**2 * 4, "scores and weights"
    # By tiles the result is all that grows.
    grown = peak(results, kind="tiled", **long) - peak(results, kind="tiled", **short)
    assert grown <= 2 * 512 * heads * dim * 4
    if causal:
        for keys in (short, long):
            result_bytes = keys["length"] * heads * dim * 4
            assert result_bytes <= peak(results, kind="engine", **keys) <= 2 * result_bytes + 65536
            assert (saving(results["cases"], **keys) or 0) > 0.9


def test_all_agree_with_float64(results: dict[str, Any]) -> None:
    for record in results["cases"] + results["exactness"]:
        assert record["error"] < {"float64": 1e-14, "float32": 2e-6, "bfloat16": 1e-2}[record["dtype"]], record


def test_a_prompt_goes_through_the_core_whole_whatever_the_attention(results: dict[str, Any]) -> None:
    assert {record["kind"] for record in results["core"]} == {"standard", "tiled", "torch"}
    for record in results["core"]:
        assert record["step_tokens"] == [[record["length"]]]
    assert (saving(results["core"], length=512) or 0) > 0.5


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ideas_memory.DoesNotFit):
        ideas_memory.usage(lambda: torch.empty(1 << 30, dtype=torch.uint8), "cpu", limit_bytes=256 << 20)
    used, result = ideas_memory.usage(lambda: torch.ones(1 << 20, dtype=torch.uint8), "cpu", limit_bytes=256 << 20)
    assert used.peak_bytes == result.numel() == 1 << 20


def test_a_length_that_does_not_fit_is_marked_in_the_table(results: dict[str, Any]) -> None:
    cut = json.loads(json.dumps(results))
    for record in cut["cases"]:
        if record["kind"] == "standard" and record["length"] == 1024:
            del record["peak_bytes"], record["seconds"], record["error"]
            record["fits"] = False
    longer = [dict(record, length=256) for record in cut["cases"] if record["length"] == 512]  # a curve needs two points
    cut["cases"] = longer + cut["cases"]
    assert any("does not fit" in row for row in ideas_flash_attention.IDEA.tables(cut)[0].rows)
    assert "1,024 tokens does not fit" in ideas_flash_attention.IDEA.summary(cut)


@pytest.mark.parametrize("shape", ["3", "3x", "x64", "0x64", "3 x 64", "3x64x2"])
def test_a_shape_is_heads_and_a_size(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ideas.run(ideas_flash_attention.IDEA, ["--smallest", "--shapes", shape])
    assert f"must be like 8x128, got '{shape}'" in capsys.readouterr().err


@pytest.mark.parametrize("fits", [True, False])
def test_one_length_alone_has_no_growth(results: dict[str, Any], fits: bool, tmp_path: Path) -> None:
    """As from `--lengths 512`, and where standard attention does not fit at all."""
    alone = json.loads(json.dumps(results))
    alone["cases"] = [record for record in alone["cases"] if record["length"] == 512]
    for record in alone["cases"]:
        if record["kind"] == "standard" and not fits:
            del record["peak_bytes"], record["seconds"], record["error"]
            record["fits"] = False
    idea = ideas_flash_attention.IDEA
    assert set(idea.tables(alone)[0].rows[-1][1:]) == {"–", ""}
    assert ("grows" in idea.summary(alone), "does not fit" in idea.summary(alone)) == (False, not fits)
    pytest.importorskip("matplotlib")
    ideas.draw(idea.plots[""], alone, "here", tmp_path / "alone.png")


def test_a_gpu_gets_its_queries_keys_and_values_as_a_merged_projection_makes_them() -> None:
    q, k, v = (torch.full((5, 3, 8), float(i)) for i in range(3))
    views = ideas_flash_attention.as_projected(q, k, v)
    assert all(torch.equal(view, x) for view, x in zip(views, (q, k, v), strict=True))
    assert {view.untyped_storage().data_ptr() for view in views} == {views[0].untyped_storage().data_ptr()}
    assert {view.stride() for view in views} == {(3 * 3 * 8, 8, 1)}
