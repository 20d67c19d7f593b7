"""The parts of a token's step at their smallest size: which they are, shapes and bytes; nothing of the clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ideas
import ideas_layer
import ideas_layer_parts
import pytest
import torch
from dummy_model import SHAPES

from engine.kernels.cpu_library import unavailable_reason
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from tests import tiny_models
from tests.device_harness import build

FLAGS = ["--device", "cpu", "--smallest", "--dtype", "float32"]
IN_LAYERS = ["qkv", "rotary", "attention", "output", "gate_up", "down"]
needs_kernels = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("ideas") / "layer.json"
    assert ideas.run(ideas_layer.IDEA, [*FLAGS, "--json", str(path)]) == 0
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@needs_kernels
def test_the_way_of_a_token_is_whole(record: dict[str, Any]) -> None:
    for point in record["results"]["points"]:
        names = [part["part"] for part in point["parts"]]
        assert [name for name in names if name in IN_LAYERS] == IN_LAYERS
        assert names[0] == "embedding" and names[-3:] == ["head", "sampling", "around"]
        assert all(part["part"] in ideas_layer.LABELS and part["seconds"] >= 0 for part in point["parts"][:-1])
        layers = SHAPES["llama-tiny"]["num_hidden_layers"]
        of_layers = {*IN_LAYERS, "input_norm", "mlp_norm"}
        assert all(part["calls"] == (layers if part["part"] in of_layers else 1) for part in point["parts"])


@needs_kernels
def test_bytes_are_those_of_weights_and_pages(record: dict[str, Any]) -> None:
    shape, points = SHAPES["llama-tiny"], record["results"]["points"]
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads, dim = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    of_token = layers * 2 * kv_heads * dim * 4
    for point in points:
        moved = {part["part"]: part["bytes"] for part in point["parts"]}
        assert moved["qkv"] == layers * hidden * (heads + 2 * kv_heads) * dim * 4
        assert moved["output"] == layers * heads * dim * hidden * 4
        assert moved["gate_up"] == layers * hidden * 2 * wide * 4
        assert moved["down"] == layers * wide * hidden * 4
        assert moved["head"] == hidden * shape["vocab_size"] * 4
        assert moved["attention"] == of_token * (point["context"] + 1)
        assert moved["rotary"] == of_token
    shapes = {part["part"]: part["shape"] for part in points[-1]["parts"]}
    assert shapes["attention"] == "q [4, 16] over k, v [48, 2, 16]"
    assert shapes["gate_up"] == "x [1, 64] · [64, 2 × 128] → [1, 128]"


@torch.inference_mode()
def test_the_parts_on_a_device_are_calls_of_the_engines_own_layers(tmp_path: Path) -> None:
    """On a CPU in the kernels' interpreter; counted instead of timed."""
    tiny_models.build("llama", tmp_path)
    has_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if has_gpu else (torch.device("cpu"), torch.float32)
    engine = build(tmp_path, device, dtype)
    runner = engine.runner
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    engine.core.add(AddRequest(request_id="r", prompt_token_ids=list(range(3, 25)), sampling=sampling))
    for _ in range(4):
        engine.core.step()
    calls = ideas_layer_parts._device_calls(runner)
    assert list(calls) == ["inputs", "embedding", *IN_LAYERS, "final_norm", "head", "sampling"]
    num_layers = len(engine.loaded.layers)
    assert all(len(each) == (num_layers if name in IN_LAYERS else 1) for name, each in calls.items())

    def counted(work: Callable[[], object]) -> float:
        work()
        return 1.0

    parts = ideas_layer_parts.device_parts(runner, {"attention": 7, "rotary": 1}, 22, counted)
    moved = {part["part"]: part["bytes"] for part in parts}
    assert moved["attention"] == 7
    fused: Any = runner._model.fused
    assert moved["down"] == sum(layer.mlp.down.weight.nbytes for layer in fused.layers)
    # A part that is called once is timed by many calls, and told as one.
    assert {part["part"]: part["seconds"] for part in parts}["head"] == 1 / ideas_layer_parts.CALLS_IN_GRAPH
    assert all(part["seconds"] == 1 for part in parts if part["part"] in IN_LAYERS)


def test_figures_are_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept, out = tmp_path / "layer.json", tmp_path / "pictures"
    kept.write_text(json.dumps(record))
    assert ideas.run(ideas_layer.IDEA, ["--from-json", str(kept), "--out", str(out)]) == 0
    for name in ("layer-cpu.png", "layer-contexts-cpu.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
