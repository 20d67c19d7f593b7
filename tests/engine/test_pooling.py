"""Embeddings through whole engines, on every path of the device side, against Hugging Face's hidden states in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.kernels.cpu_library import unavailable_reason
from engine.messages import AddRequest, Pooling
from engine.sampling_params import SamplingParams
from tests import tiny_models

CONTEXT, BLOCK_SIZE = 96, 16
IN_SHORT = {"eager": ("llama", "gemma2"), "native": ("llama", "gemma2"), "on_device": ("llama",)}


def on_a_cpu(folder: Path, budget: int, blocks: int, *, cpu_kernels: bool) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(model=str(folder), dtype="float32", max_model_len=CONTEXT),
        cache=CacheConfig(num_kv_blocks=blocks, block_size=BLOCK_SIZE),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget),
        parallel=ParallelConfig(num_threads=1),
        device="cpu",
        cpu_kernels=cpu_kernels,
    )
    return build_engine(config, lambda phase, detail, fraction: None)[0]


def eager(folder: Path, budget: int, blocks: int) -> EngineCore:
    """Hugging Face's own forward over our pages."""
    return on_a_cpu(folder, budget, blocks, cpu_kernels=False)


def native(folder: Path, budget: int, blocks: int) -> EngineCore:
    if (reason := unavailable_reason()) is not None:
        pytest.skip(reason)
    return on_a_cpu(folder, budget, blocks, cpu_kernels=True)


def on_device(folder: Path, budget: int, blocks: int) -> EngineCore:
    """The fused decoder in pieces over static memory, a step ahead; kernels in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from tests import device_harness

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_harness.build(
        folder, device, torch.float32, budget=budget, max_num_seqs=4, blocks=blocks, max_model_len=CONTEXT
    ).core


PATHS: dict[str, Callable[[Path, int, int], EngineCore]] = {"eager": eager, "native": native, "on_device": on_device}


def hidden_states(folder: Path, prompt: list[int]) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].numpy()


Wish = tuple[list[int], Pooling]


def embed(core: EngineCore, wishes: list[Wish], **others: SamplingParams) -> list[np.ndarray]:
    """Of all prompts, queued together and among `others`, which generate from the first prompt."""
    for name, sampling in others.items():
        core.add(AddRequest(request_id=name, prompt_token_ids=wishes[0][0], sampling=sampling))
    for i, (prompt, pooling) in enumerate(wishes):
        sampling = SamplingParams(max_tokens=0)
        core.add(AddRequest(request_id=f"e{i}", prompt_token_ids=prompt, sampling=sampling, pooling=pooling))
    vectors = {}
    while core.has_work:
        for output in core.step():
            if output.embedding is not None:
                assert output.finish_reason is not None and output.token_ids == []
                vectors[output.request_id] = np.frombuffer(output.embedding, dtype="<f4")
        core.check_integrity()
    return [vectors[f"e{i}"] for i in range(len(wishes))]


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(5, 300, size=length).tolist() for length in lengths]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_embeddings_are_hugging_face_s_hidden_states(name: str, path: str, tmp_path: Path, run_all: bool):
    if name not in IN_SHORT[path] and not run_all:
        pytest.skip("the other architectures run with --run-all")
    tiny_models.build(name, tmp_path)
    is_slow = path == "on_device" and not torch.cuda.is_available()
    lengths, budget, num_beside = ((3,), 4, 0) if is_slow else ((37, 1, 16, 5), 11, 7)  # chunks of every length
    poolings: tuple[Pooling, ...] = ("mean", "last")
    wishes = [(prompt, pooling) for prompt in prompts_of(*lengths) for pooling in poolings]
    beside = SamplingParams(temperature=0.0, max_tokens=num_beside, ignore_eos=True)
    vectors = embed(PATHS[path](tmp_path, budget, 24), wishes, beside=beside)
    for (prompt, pooling), vector in zip(wishes, vectors, strict=True):
        states = hidden_states(tmp_path, prompt)
        pooled = states.mean(0) if pooling == "mean" else states[-1]
        assert vector.dtype == np.float32 and vector.shape == pooled.shape
        np.testing.assert_allclose(vector, pooled, atol=2e-5 * float(np.abs(states).max()))


def test_an_embedding_is_the_same_with_a_cached_prefix_and_after_preemption(tmp_path: Path):
    tiny_models.build("llama", tmp_path)
    wishes: list[Wish] = [(prompt, "mean") for prompt in prompts_of(40, 33)]
    alone = [embed(eager(tmp_path, 256, 24), [wish])[0] for wish in wishes]
    core = eager(tmp_path, 16, 24)
    embed(core, wishes)
    np.testing.assert_allclose(embed(core, wishes), alone, atol=1e-5)  # all pages are in the cache by now
    # Seven pages for three that want eight: two that generate grow, and the youngest, the embedding, gives way.
    core = eager(tmp_path, 8, 7)
    generating = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    core.add(AddRequest(request_id="grows", prompt_token_ids=wishes[0][0], sampling=generating))
    core.step()
    (vector,) = embed(core, wishes[1:], also=generating)
    np.testing.assert_allclose(vector, alone[1], atol=1e-5)
    assert core.stats().preemptions > 0
