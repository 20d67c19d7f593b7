"""Whole models through the compiled CPU kernels, against the same models over exact attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.attention.base import RaggedBatch, group_layers
from engine.attention.hf import StepAttention
from engine.attention.native import NativeBackend
from engine.attention.sdpa import SdpaBackend
from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.fusion import fuse_native, pack_linears
from engine.kernels.cpu_library import cpu_kernels, unavailable_reason
from engine.kernels.cpu_ops import DECODER_PARTS, Format
from engine.messages import AddRequest
from engine.model_loader import LoadedModel, load_model
from engine.sampling_params import SamplingParams
from engine.split_model import SplitModel
from tests import tiny_models

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

CPU = torch.device("cpu")
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
OTHERS = ("qwen3_moe", "gpt_oss")
LENGTHS = ([40, 7, 1], [3, 1, 1], [1, 1, 1])  # of each sequence's chunks in one step after another


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    tiny_models.build(name, folder)
    return load_model(folder, ModelConfig(model=str(folder)), CPU, dtype)


def logits(loaded: LoadedModel, format: Format | None) -> torch.Tensor:
    """Of all tokens of three sequences, through the kernels in this format; None: as transformers has it, attention exact."""
    layers, model = loaded.layers, loaded.model
    groups = group_layers(layers, 16, loaded.dtype.itemsize)
    backend = (SdpaBackend if format is None else NativeBackend)(layers, groups, 16, loaded.dtype, CPU)
    backend.allocate([20] * len(groups))
    fused = None
    if format is not None:
        assert isinstance(backend, NativeBackend)
        fused = fuse_native(model, layers, 128, cpu_kernels(), backend, format)
        pack_linears(model, cpu_kernels(), format, head_only=fused is not None)
    split = SplitModel(model, loaded.vocab_size, fused)
    ids = torch.randint(3, loaded.vocab_size, (3, 64), generator=torch.Generator().manual_seed(0))
    tables, contexts, parts = [[1 + 4 * row + i for i in range(4)] for row in range(3)], [0, 0, 0], []
    for counts in LENGTHS:
        batch = RaggedBatch(counts, list(contexts), (tables,) * len(groups))
        spans = [range(start, start + count) for start, count in zip(contexts, counts, strict=True)]
        step_ids = torch.cat([ids[row, span.start : span.stop] for row, span in enumerate(spans)])
        positions = torch.tensor([position for span in spans for position in span])
        hidden = split.hidden_states(step_ids[None], positions[None], StepAttention.of(backend, batch))
        parts.append(split.logits(hidden).float())
        contexts = [start + count for start, count in zip(contexts, counts, strict=True)]
    return torch.cat(parts)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", DENSE + OTHERS)
@torch.inference_mode()
def test_float32_logits_are_the_models_own(name: str, tmp_path: Path):
    expected = logits(load(name, tmp_path), None)
    assert relative_error(logits(load(name, tmp_path), "float32"), expected) < 1e-5


@pytest.mark.parametrize("name", DENSE + OTHERS)
@torch.inference_mode()
def test_low_precision_is_near(name: str, tmp_path: Path):
    """Experts chosen by near ties may be others in low precision, whatever computes it."""
    expected = logits(load(name, tmp_path), None)
    formats: tuple[tuple[Format, float], ...] = (("bfloat16", 0.03), ("int8", 0.1))
    for format, limit in formats:
        error = relative_error(logits(load(name, tmp_path, torch.bfloat16), format), expected)
        assert error < (limit if name in DENSE else 0.5)


@pytest.mark.parametrize("name", DENSE)
@torch.inference_mode()
def test_dense_decoders_run_in_one_call(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loaded = load(name, tmp_path)
    backend = NativeBackend(loaded.layers, group_layers(loaded.layers, 16, 4), 16, torch.float32, CPU)
    with caplog.at_level("INFO"):
        assert fuse_native(loaded.model, loaded.layers, 128, cpu_kernels(), backend, "float32") is not None
    assert "packed the" in caplog.text


@pytest.mark.parametrize("name", OTHERS)
@torch.inference_mode()
def test_the_log_says_why_a_model_does_not(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    loaded = load(name, tmp_path)
    backend = NativeBackend(loaded.layers, group_layers(loaded.layers, 16, 4), 16, torch.float32, CPU)
    assert fuse_native(loaded.model, loaded.layers, 128, cpu_kernels(), backend, "float32") is None
    assert "mixtures of experts are not among them" in caplog.text


@torch.inference_mode()
def test_a_layer_that_differs_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    loaded = load("llama", tmp_path)
    before = logits(load("llama", tmp_path), None)
    monkeypatch.setattr("engine.native_decoder.ACTIVATIONS", {"silu": 1})  # GELU in its place
    backend = NativeBackend(loaded.layers, group_layers(loaded.layers, 16, 4), 16, torch.float32, CPU)
    assert fuse_native(loaded.model, loaded.layers, 128, cpu_kernels(), backend, "float32") is None
    assert "the fused layer 0 differs by" in caplog.text
    torch.testing.assert_close(logits(loaded, None), before)


def greedy_tokens(folder: Path, **how: object) -> list[int]:
    model = ModelConfig(model=str(folder), max_model_len=64, quantization=str(how.pop("quantization", "none")), dtype="float32")
    core, _ = build_engine(
        EngineConfig(model=model, cache=CacheConfig(num_kv_blocks=16), device="cpu", **how),  # type: ignore[arg-type]
        lambda *_: None,
    )
    core.add(
        AddRequest(
            request_id="r",
            prompt_token_ids=[5, 9, 40, 7, 11],
            sampling=SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        )
    )
    tokens: list[int] = []
    while core.has_work:
        for output in core.step():
            tokens += output.token_ids
    return tokens


def test_an_engine_without_the_kernels_says_the_same(tmp_path: Path):
    tiny_models.build("qwen3", tmp_path)
    expected = greedy_tokens(tmp_path, cpu_kernels=False)
    assert len(expected) == 24
    assert greedy_tokens(tmp_path) == expected
    assert greedy_tokens(tmp_path, attention_backend="sdpa") == expected
    assert greedy_tokens(tmp_path, quantization="int8", cpu_kernels=False) == greedy_tokens(tmp_path, quantization="int8")


@torch.inference_mode()
def test_the_parts_of_a_step_are_timed_where_somebody_asks(tmp_path: Path):
    loaded = load("llama", tmp_path)
    groups = group_layers(loaded.layers, 16, 4)
    backend = NativeBackend(loaded.layers, groups, 16, torch.float32, CPU)
    backend.allocate([4])
    native = fuse_native(loaded.model, loaded.layers, 128, cpu_kernels(), backend, "float32")
    assert native is not None
    attention = StepAttention.of(backend, RaggedBatch([24], [0], ([[1, 2]],)))
    ids = torch.arange(3, 27)
    plain = native(ids, attention)
    native.part_seconds = np.zeros(len(DECODER_PARTS))
    torch.testing.assert_close(native(ids, attention), plain, rtol=0, atol=0)
    once = native.part_seconds.copy()
    assert (once >= 0).all() and once.sum() > 0
    native(ids, attention)
    assert native.part_seconds.sum() > once.sum(), "they are added up"
