"""Bad numbers stay with their request: it ends with an error, the others' text is as ever, and its pages are nobody's.

The fake runner has a token after which all is bad; the real models have one whose embedding is NaN.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.block_pool import BlockPool, block_hashes, root_hash
from engine.build import build_engine
from engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import InvalidRequest
from engine.messages import AddRequest, Pooling, RequestOutput
from engine.sampling_params import SamplingParams, StructuredSpec
from tests import device_harness, tiny_models
from tests.fake_runner import VOCAB_SIZE
from tests.scheduler_harness import Harness, expect, prompt_of

BAD = VOCAB_SIZE - 1  # of the fake runner
POISON = 310  # of the real models; no text of their tokenizer has it


# -- scheduler and pages ------------------------------------------------------------------------------------------------


def good_prompt(length: int, seed: int = 0) -> list[int]:
    return [token_id for token_id in prompt_of(2 * length, seed) if token_id != BAD][:length]


def harness_with_bad_token(**options: object) -> Harness:
    harness = Harness(**options)  # type: ignore[arg-type]
    harness.runner.bad_token = BAD
    return harness


def error_codes(harness: Harness) -> dict[str, str | None]:
    return {output.request_id: output.error.code for output in harness.outputs if output.error is not None}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("windows", [(None,), (None, 8)])
def test_a_bad_request_ends_alone(depth: int, windows: tuple[int | None, ...]) -> None:
    harness = harness_with_bad_token(depth=depth, windows=windows)
    prompts = {f"r{i}": good_prompt(3 + 7 * i, seed=i) for i in range(4)}
    harness.add("bad", [*good_prompt(30, seed=9), BAD, 5, 6])
    for name, prompt in prompts.items():
        harness.add(name, prompt)
    harness.run()
    assert harness.finished.pop(("bad", 0)) == "error" and error_codes(harness) == {"bad": "bad_numbers"}
    for name, prompt in prompts.items():
        expected = expect(prompt, 8)
        if BAD not in expected:
            assert harness.tokens[name, 0] == expected and harness.finished[name, 0] == "length"


@pytest.mark.parametrize("depth", [0, 1])
def test_pages_of_bad_numbers_are_found_by_nobody_and_zeroed_before_reuse(depth: int) -> None:
    harness = harness_with_bad_token(depth=depth, num_blocks=12)
    prompt = [*good_prompt(10, seed=1), BAD, *good_prompt(15, seed=2)]
    harness.add("bad", prompt)
    harness.run()
    assert harness.kv.num_cached_blocks == 0
    harness.add("again", prompt)
    harness.run()
    assert harness.finished["again", 0] == "error"
    assert all(row.num_computed_tokens == 0 for step in harness.runner.steps for row in step.new_rows), "a prefix was shared"
    for i in range(6):  # every page is written to again: the fake runner would find one that was not zeroed
        harness.add(f"r{i}", good_prompt(30, seed=20 + i), max_tokens=2)
    harness.run()
    zeroed = [block for step in harness.runner.steps for block in step.zeroed_blocks]
    assert len(set(zeroed)) >= 7


def test_a_page_shared_with_a_sound_request_is_zeroed_when_that_has_ended() -> None:
    harness = harness_with_bad_token(max_num_batched_tokens=64)
    prefix = good_prompt(12, seed=3)
    harness.add("sound", prefix, max_tokens=20)
    harness.step()
    harness.add("bad", [*prefix, 4, BAD])
    while ("bad", 0) not in harness.finished:
        harness.step()
    harness.run()
    tokens = expect(prefix, 20)
    assert BAD in tokens or harness.tokens["sound", 0] == tokens
    harness.add("later", [*prefix, 7, 8, 9])
    harness.run()
    row = [row for step in harness.runner.steps for row in step.new_rows][-1]
    assert row.num_computed_tokens == 0, "what a bad request had in its table is computed again"


@pytest.mark.parametrize("depth", [0, 1])
def test_all_choices_of_a_bad_prompt_end_with_one_error(depth: int) -> None:
    harness = harness_with_bad_token(depth=depth)
    harness.add("bad", [*good_prompt(9), BAD], n=3)
    harness.run()
    assert [harness.finished["bad", i] for i in range(3)] == ["error"] * 3
    assert sum(output.error is not None for output in harness.outputs) == 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_of_bad_numbers_is_an_error(pooling: Pooling) -> None:
    harness = harness_with_bad_token()
    harness.add("bad", [*good_prompt(30), BAD, 3], pooling=pooling)
    harness.add("good", good_prompt(30, seed=4), pooling=pooling)
    harness.run()
    assert error_codes(harness) == {"bad": "bad_numbers"} and harness.finished["good", 0] == "length"


def test_prompt_logprobs_of_bad_numbers_are_an_error() -> None:
    harness = harness_with_bad_token()
    harness.add("bad", [*good_prompt(30), BAD, *good_prompt(20)], prompt_logprobs=1, max_tokens=0)
    harness.run()
    assert error_codes(harness) == {"bad": "bad_numbers"}


def test_pages_are_zeroed_after_a_step_that_did_not_fit() -> None:
    harness = harness_with_bad_token(num_blocks=10)
    harness.add("bad", [*good_prompt(20), BAD])
    harness.run()
    fails = iter([True])
    harness.runner.out_of_memory = lambda step: next(fails, False)
    harness.add("good", good_prompt(30, seed=5), max_tokens=2)
    harness.run()
    assert harness.finished["good", 0] == "length"
    assert sum(len(step.zeroed_blocks) for step in harness.runner.steps) == 6


@pytest.mark.parametrize("seed", range(20))
def test_bad_requests_among_many_with_preemption_and_aborts(seed: int) -> None:
    rng = random.Random(seed)
    harness = harness_with_bad_token(depth=seed % 2, num_blocks=24, max_num_seqs=5)
    prefix = good_prompt(16, seed=seed)
    names = [f"r{i}" for i in range(30)]
    for i, name in enumerate(names):
        prompt = prefix[: rng.choice([0, 4, 8, 16])] + good_prompt(rng.randint(1, 20), seed=100 * seed + i)
        if rng.random() < 0.3:
            prompt.insert(rng.randrange(len(prompt)), BAD)
        harness.add(name, prompt, n=rng.choice([1, 1, 2]), max_tokens=rng.randint(1, 12))
        for _ in range(rng.randint(0, 2)):
            harness.step()
        if rng.random() < 0.1:
            harness.core.abort(name)
    harness.run()
    assert set(error_codes(harness).values()) <= {"bad_numbers"} and harness.kv.num_referenced_blocks == 0


def test_tokens_outside_the_vocabulary_end_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(max_num_batched_tokens=64)
    sample = harness.runner._sample
    monkeypatch.setattr(harness.runner, "_sample", lambda slot, *rest: 96 if len(slot.tokens) == 20 else sample(slot, *rest))
    harness.core._vocab_size = 96
    good, bad = [t % 90 for t in prompt_of(5)], [t % 90 for t in prompt_of(20)]
    harness.add("bad", bad)
    harness.step()
    assert error_codes(harness) == {"bad": "bad_numbers"}
    message = AddRequest(request_id="x", prompt_token_ids=good, sampling=SamplingParams(), output_token_ids=[[1, 96]])
    with pytest.raises(InvalidRequest, match="output_token_ids has a token id outside 0 to 95"):
        harness.core.add(message)


def test_a_tainted_page_is_known_to_nobody() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    known, other = block_hashes(root_hash(""), [1, 2, 3, 4], 2)
    pool.set_hash(first, known)
    pool.share([first])
    pool.taint([first, second])
    assert pool.lookup(known) is None and pool.take_to_zero() == []
    pool.set_hash(second, other)
    assert pool.lookup(other) is None, "it may not become known while it is tainted"
    pool.free([first, second])
    pool.check_integrity({first: 1})
    assert pool.take_to_zero() == [second]
    pool.free([first])
    assert pool.take_to_zero() == [first] and pool.num_free == 3
    pool.check_integrity({})


# -- real models --------------------------------------------------------------------------------------------------------


def poisoned(folder: Path, name: str = "llama") -> Path:
    """A model with a token whose embedding is NaN."""
    tiny_models.build(name, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    weights["lm_head.weight"][POISON] = 0.0  # so that no sound request comes to say it
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned(tmp_path_factory.mktemp("poisoned"))


def engine(folder: Path, attention_backend: str) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(model=str(folder), dtype="float32", max_model_len=256),
        cache=CacheConfig(num_kv_blocks=60, block_size=16),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
        parallel=ParallelConfig(num_threads=1),
        device="cpu",
        attention_backend=attention_backend,
    )
    return build_engine(config, lambda phase, detail, fraction: None)[0]


def pages_have_nan(core: EngineCore) -> bool:
    pages = core._runner._backend._pages  # type: ignore[attr-defined]
    return any(bool(part.isnan().any()) for layer in pages.values() for part in layer)


def run(core: EngineCore, messages: list[AddRequest]) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {message.request_id: [] for message in messages}
    for message in messages:
        core.add(message)
    while core.has_work or core.is_compiling:
        core.take_compiled()
        for output in core.step():
            outputs[output.request_id].append(output)
        core.check_integrity()
    return outputs


def message(name: str, prompt: list[int], **options: object) -> AddRequest:
    pooling = options.pop("pooling", None)
    sampling = SamplingParams(**{"max_tokens": 0 if pooling else 6, "ignore_eos": True, **options})  # type: ignore[arg-type]
    return AddRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, pooling=pooling)  # type: ignore[arg-type]


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(5, 300, size=length).tolist()


KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 1.0, "seed": 3},
    "filtered": {"temperature": 1.0, "seed": 3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "typical": {"temperature": 1.0, "seed": 3, "typical_p": 0.8},
    "penalties": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "bias": {"temperature": 0.0, "logit_bias": {9: 3.0}},
    "allowed": {"temperature": 0.0, "allowed_token_ids": tuple(range(40, 80))},
    "bad_words": {"temperature": 0.0, "bad_words": ((40, 41),)},
    "grammar": {"temperature": 0.0, "structured": StructuredSpec("regex", "[a-z ]{40,60}")},
    "choices": {"temperature": 1.0, "seed": 3, "n": 2},
}


@pytest.mark.parametrize("attention_backend", ["native", "sdpa"])
def test_every_way_to_sample_ends_the_bad_request_alone(folder: Path, attention_backend: str) -> None:
    core = engine(folder, attention_backend)
    clean = prompt(21, seed=1)
    poison = [*prompt(40, seed=2), POISON, *prompt(7, seed=3)]
    expected = {kind: run(core, [message("r", clean, **options)])["r"] for kind, options in KINDS.items()}
    num_cached = core.stats().num_cached_blocks
    for kind, options in KINDS.items():
        outputs = run(core, [message("bad", poison, **options), message("good", clean, **options)])
        assert ids(outputs["good"]) == ids(expected[kind]), kind
        (last,) = outputs["bad"]
        assert last.error is not None and (last.error.kind, last.error.code) == ("RequestFailed", "bad_numbers"), kind
        assert last.token_ids == [] and last.finish_reason == "error"
    assert core.stats().num_cached_blocks <= num_cached + 4, "pages of the bad requests are known"
    run(core, [message("r", clean)])
    assert not pages_have_nan(core)
    core.close()


@pytest.mark.parametrize("attention_backend", ["native", "sdpa"])
def test_embeddings_and_prompt_logprobs(folder: Path, attention_backend: str) -> None:
    core = engine(folder, attention_backend)
    poison, clean = [*prompt(20, seed=2), POISON, 7, 8], prompt(20, seed=4)
    for options in ({"pooling": "mean"}, {"pooling": "last"}, {"prompt_logprobs": 1}, {"prompt_logprobs": 0, "max_tokens": 0}):
        outputs = run(core, [message("bad", poison, **options), message("good", clean, **options)])
        (bad,) = outputs["bad"]
        assert bad.error is not None and bad.error.code == "bad_numbers" and bad.embedding is None
        assert outputs["good"][-1].finish_reason == "length"
    run(core, [message("r", clean)])
    assert not pages_have_nan(core)
    core.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's way; on a GPU this is for the card itself")
@pytest.mark.parametrize("kind", ["greedy", "filtered", "penalties"])
@torch.inference_mode()
def test_on_the_device_path_one_step_ahead(folder: Path, kind: str, run_all: bool) -> None:
    pytest.importorskip("triton")
    if kind != "filtered" and not run_all:
        pytest.skip("the other ways run with --all")
    harness = device_harness.build(
        folder, torch.device("cpu"), torch.float32, budget=24, max_num_seqs=2, blocks=10, max_model_len=48
    )
    clean, poison = prompt(5, seed=1), [*prompt(4, seed=2), POISON]
    options = KINDS[kind] | {"max_tokens": 3}
    (expected,) = harness.run([message("r", clean, **options)]).values()
    outputs = harness.run([message("bad", poison, **options), message("good", clean, **options)])
    assert ids(outputs["good"]) == ids(expected)
    assert [output.error.code for output in outputs["bad"] if output.error] == ["bad_numbers"]
    harness.run([message("r", clean, **options)])
    assert not any(bool(part.isnan().any()) for layer in harness.backend._pages.values() for part in layer)  # type: ignore[attr-defined]
    harness.core.close()
