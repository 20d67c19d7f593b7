"""The fused decoder against the loaded model, layer by layer and as a whole, with the kernels in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.attention.base import group_layers
from engine.config import ModelConfig
from engine.fused_decoder import FusedDecoder
from engine.fusion import fuse
from engine.model_loader import LoadedModel, load_model
from tests import tiny_models

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt_oss")


def load(name: str, folder: Path) -> LoadedModel:
    tiny_models.build(name, folder)
    return load_model(folder, ModelConfig(model=str(folder)), DEVICE, torch.float32)


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_every_known_architecture_is_fused(name: str, tmp_path: Path):
    loaded = load(name, tmp_path)
    assert isinstance(fuse(loaded.model, loaded.layers, 128), FusedDecoder)


@torch.inference_mode()
def test_a_layer_that_differs_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load("llama", tmp_path)
    monkeypatch.setattr("engine.fused_decoder.Norm.add_and_apply", lambda self, x, residual, post: self.apply(residual))
    assert fuse(loaded.model, loaded.layers, 128) is None


@torch.inference_mode()
def test_an_unknown_layer_stays_as_it_was(tmp_path: Path):
    loaded = load("llama", tmp_path)
    loaded.model.model.layers[1].__class__ = type("SomethingElse", (type(loaded.model.model.layers[1]),), {})
    assert fuse(loaded.model, loaded.layers, 128) is None


@torch.inference_mode()
def test_the_original_still_runs_on_the_merged_weights(tmp_path: Path):
    loaded = load("qwen2", tmp_path)
    layer = loaded.model.model.layers[0]
    x = torch.randn(3, 64, device=DEVICE)
    before = [layer.self_attn.q_proj(x), layer.self_attn.v_proj(x), layer.mlp.up_proj(x)]
    fused = fuse(loaded.model, loaded.layers, 128)
    assert fused is not None
    after = [layer.self_attn.q_proj(x), layer.self_attn.v_proj(x), layer.mlp.up_proj(x)]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old)
    merged = fused.linears()[0]
    assert layer.self_attn.k_proj.weight.data_ptr() == merged.weight[merged.slices[1]].data_ptr()


def test_groups_are_those_of_the_layers(tmp_path: Path):
    loaded = load("gemma3_text", tmp_path)
    assert [group.window for group in group_layers(loaded.layers, 16, 4)] == [8, None]
