"""Embeddings in the scheduler: whole prompts, whatever the chunks, hits and preemptions."""

from __future__ import annotations

import numpy as np
import pytest

from engine.messages import Pooling
from tests.scheduler_harness import Harness, expect, prompt_of


def embedding(harness: Harness, name: str) -> list[float]:
    (output,) = [output for output in harness.outputs if output.request_id == name]
    assert output.finish_reason == "length" and output.token_ids == [] and output.embedding is not None
    return np.frombuffer(output.embedding, dtype="<f4").tolist()


def expected(prompt: list[int], pooling: Pooling) -> list[float]:
    """The fake runner's vector: ids and number of tokens, for the mean both over the number of tokens."""
    return [pytest.approx(sum(prompt) / len(prompt)), 1.0] if pooling == "mean" else [prompt[-1], 1.0]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 60])
def test_a_prompt_in_chunks_is_pooled_whole(depth: int, pooling: Pooling, length: int) -> None:
    harness = Harness(depth=depth)
    prompt = prompt_of(length)
    harness.add("e", prompt, pooling=pooling)
    harness.run()
    assert embedding(harness, "e") == expected(prompt, pooling)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_mean_reads_no_prefix_hits_but_leaves_its_pages_to_others(pooling: Pooling) -> None:
    harness = Harness()
    prompt = prompt_of(32)
    harness.add("first", prompt, pooling=pooling)
    harness.run()
    harness.add("again", prompt, pooling=pooling)
    harness.add("text", prompt, max_tokens=3)
    harness.run()
    assert embedding(harness, "again") == expected(prompt, pooling)
    (text,) = [output for output in harness.outputs if output.request_id == "text" and output.first_token_index == 0]
    assert text.num_cached_tokens == 28
    assert harness.core.stats().cached_prompt_tokens == (28 if pooling == "mean" else 56)


@pytest.mark.parametrize("depth", [0, 1])
def test_embeddings_among_text(depth: int) -> None:
    harness = Harness(depth=depth, num_blocks=24, max_num_seqs=6)
    prompts = {f"r{i}": prompt_of(9 + 5 * i, seed=i) for i in range(6)}
    for i, (name, prompt) in enumerate(prompts.items()):
        if i % 2:
            harness.add(name, prompt, pooling="mean")
        else:
            harness.add(name, prompt, max_tokens=20)
    harness.run()
    for i, (name, prompt) in enumerate(prompts.items()):
        if i % 2:
            assert embedding(harness, name) == expected(prompt, "mean")
        else:
            assert harness.tokens[name, 0] == expect(prompt, 20)
