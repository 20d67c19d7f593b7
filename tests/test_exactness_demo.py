"""The demo model's greedy tokens equal Hugging Face `generate` in float32, in every situation of `test_exactness`."""

from __future__ import annotations

import random

import pytest

from engine.config import ModelConfig
from engine.model_loader import resolve_model
from tests.test_exactness import Reference, engine, load_reference, run


@pytest.fixture(scope="module")
def demo() -> Reference:
    return load_reference(resolve_model(ModelConfig(model="demo"), lambda phase, detail, fraction: None))


def test_the_demo_model_is_exact(demo: Reference, run_all: bool):
    rng = random.Random(3)
    prompts = [demo.prompt(rng.randint(1, 60), seed=i) for i in range(32 if run_all else 10)]
    expected = [demo.continuation(prompt, 6) for prompt in prompts]
    core = engine(demo)
    assert run(core, prompts[:1], 6) == expected[:1]
    assert run(core, prompts, 6) == expected
    assert run(core, prompts, 6) == expected, "with prefix hits"
    assert core.stats().cached_prompt_tokens > 0
    few = 8 if run_all else 4
    chunked = engine(demo, budget=13, max_num_seqs=few, block_size=8)
    assert run(chunked, prompts[:few], 6) == expected[:few]
    growing = prompts[1:5]  # 15 pages of 8, and 21 in the end
    longer = [demo.continuation(prompt, 12) for prompt in growing]
    small = engine(demo, blocks=19, block_size=8, max_num_seqs=4, budget=64, max_model_len=100)
    assert run(small, growing, 12) == longer
    assert small.stats().preemptions > 0
