"""Greedy tokens equal Hugging Face `generate` in float32: alone, in a crowd, with prefix hits, in awkward chunks, preempted.

The engine runs in this process: real model, real pages, real scheduler; only the sockets are left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.messages import AddRequest
from engine.sampling_params import SamplingParams
from tests import tiny_models

NUM_OUTPUT = 12


@dataclass
class Reference:
    """A model folder and Hugging Face's own greedy continuations, made once."""

    folder: Path
    model: torch.nn.Module
    vocab_size: int

    def prompt(self, length: int, seed: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(5, min(self.vocab_size, 300)) for _ in range(length)]

    def continuation(self, prompt: list[int], count: int = NUM_OUTPUT) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True
            )
        return out[0, len(prompt) :].tolist()


def load_reference(folder: Path) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # Only the greedy choice is compared: no end token, and none of the sampling defaults a model may bring.
    model.generation_config = type(model.generation_config)(pad_token_id=0)
    model.config.eos_token_id = None
    return Reference(folder, model, model.config.get_text_config().vocab_size)


@pytest.fixture(scope="module", params=tiny_models.ARCHITECTURES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return load_reference(tiny_models.build(request.param, tmp_path_factory.mktemp(request.param)))


def engine(
    reference: Reference,
    *,
    budget: int = 256,
    blocks: int = 400,
    max_num_seqs: int = 32,
    block_size: int = 16,
    max_model_len: int | None = 256,
) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(model=str(reference.folder), dtype="float32", max_model_len=max_model_len),
        cache=CacheConfig(num_kv_blocks=blocks, block_size=block_size),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
        parallel=ParallelConfig(num_threads=1),
        device="cpu",
    )
    return build_engine(config, lambda phase, detail, fraction: None)[0]


def run(core: EngineCore, prompts: list[list[int]], count: int = NUM_OUTPUT) -> list[list[int]]:
    """Greedy tokens of all prompts, queued together."""
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        core.add(AddRequest(request_id=f"r{i}", prompt_token_ids=prompt, sampling=sampling))
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        core.check_integrity()
    assert core.stats().num_referenced_blocks == 0
    return [tokens[f"r{i}"] for i in range(len(prompts))]


def test_alone_and_in_a_crowd_of_mixed_lengths(reference: Reference):
    rng = random.Random(1)
    prompts = [reference.prompt(rng.randint(1, 70), seed=i) for i in range(32)]
    expected = [reference.continuation(prompt) for prompt in prompts]
    core = engine(reference)
    assert [run(core, [prompt])[0] for prompt in prompts[:4]] == expected[:4]
    assert run(core, prompts) == expected


def test_prefix_hits(reference: Reference):
    core = engine(reference)
    shared = reference.prompt(50, seed=7)
    prompts = [shared + reference.prompt(n, seed=n) for n in (1, 5, 20)]
    expected = [reference.continuation(prompt) for prompt in prompts]
    assert [run(core, [prompt])[0] for prompt in prompts] == expected
    assert core.stats().cached_prompt_tokens >= 2 * 48
    assert run(core, prompts) == expected


@pytest.mark.parametrize("budget", [5, 17])
def test_awkward_chunks(reference: Reference, budget: int):
    prompts = [reference.prompt(n, seed=n) for n in (61, 33, 3, 16, 47)]
    expected = [reference.continuation(prompt) for prompt in prompts]
    assert run(engine(reference, budget=budget, max_num_seqs=5, block_size=8), prompts) == expected


def test_forced_preemption(reference: Reference):
    prompts = [reference.prompt(20 + i, seed=i) for i in range(6)]
    expected = [reference.continuation(prompt, 40) for prompt in prompts]
    core = engine(reference, blocks=26, block_size=4, max_num_seqs=6, budget=32, max_model_len=80)
    assert run(core, prompts, 40) == expected
    assert core.stats().preemptions > 0 or "mistral" in str(reference.folder), "the pages did not run out"
