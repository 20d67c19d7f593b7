"""The device path in float32, kernels in the interpreter: greedy tokens equal Hugging Face's, one step ahead of the results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.sampling_params import SamplingParams
from tests import device_harness, restricted_requests, tiny_models
from tests.test_exactness import load_reference

pytest.importorskip("triton")
CPU = torch.device("cpu")
IN_SHORT = ("llama", "gemma3_text")


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/gpu does this in low precision")
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_greedy_tokens_equal_generates(name: str, tmp_path: Path, run_all: bool):
    if name not in IN_SHORT and not run_all:
        pytest.skip("the other architectures run with --all")
    reference = load_reference(tiny_models.build(name, tmp_path))
    prompts = [reference.prompt(19, seed=7), reference.prompt(5, seed=1)]
    expected = [reference.continuation(prompt, 4) for prompt in prompts]
    engine = device_harness.build(tmp_path, CPU, torch.float32, budget=12, max_num_seqs=2, blocks=10, max_model_len=32)
    assert engine.generate(prompts, greedy(4)) == expected
    assert engine.generate(prompts[:1], greedy(4)) == expected[:1], "with a prefix hit"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/gpu does this in low precision")
@torch.inference_mode()
def test_restricted_tokens_and_embeddings_one_step_ahead(tmp_path: Path):
    reference = load_reference(tiny_models.build("llama", tmp_path))
    prompts = [reference.prompt(5, seed=5)]
    engine = device_harness.build(tmp_path, CPU, torch.float32, budget=12, max_num_seqs=2, blocks=10, max_model_len=96)
    restricted_requests.check_schemas_among_free_text(engine, tmp_path, prompts, restricted_requests.NAMES, num_free=2)
    restricted_requests.check_embeddings(engine, reference.model, [reference.prompt(17, seed=7)], 1e-5)
    engine.core.close()
