"""The device path on a GPU in bfloat16 against Hugging Face, graphs on and off. `scripts/gpu_check` runs this.

The reference is the model in float32 on bfloat16's weights. Hugging Face's own bfloat16 forward is some way off it; ours must
not be further off: its mean error at most 1.1 times, its largest at most 1.5 times (a maximum over random models wanders).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.messages import AddRequest, Pooling
from engine.sampling_params import SamplingParams
from tests import tiny_models

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: run scripts/gpu_check on one", allow_module_level=True)

from tests import device_harness, restricted_requests

CUDA = torch.device("cuda")
WIDE = {
    "llama-128": ("llama", {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}),
    "llama-64": ("llama", {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "head_dim": 128}),
}
MODELS = (*tiny_models.ARCHITECTURES, *WIDE)


@dataclass
class Reference:
    folder: Path
    exact: torch.nn.Module
    low: torch.nn.Module

    def logits(self, model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
        return model(torch.tensor([sequence], device=CUDA)).logits[0].float().cpu()

    def pooled(self, model: torch.nn.Module, sequence: list[int], pooling: Pooling) -> torch.Tensor:
        output = model(torch.tensor([sequence], device=CUDA), output_hidden_states=True)
        states = output.hidden_states[-1][0].float().cpu()
        return states.mean(0) if pooling == "mean" else states[-1]

    def worst_error(self, sequences: list[list[int]]) -> float:
        """Of Hugging Face's own bfloat16 forward."""
        return max(float((self.logits(self.low, s) - self.logits(self.exact, s)).abs().max()) for s in sequences)


def build(name: str, folder: Path) -> Path:
    if name not in WIDE:
        return tiny_models.build(name, folder)
    model_type, changes = WIDE[name]
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 4096,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            **changes,
        },
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = build(request.param, tmp_path_factory.mktemp(request.param))
    low = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").to(CUDA).eval()
    exact = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").to(CUDA).float().eval()
    )
    return Reference(folder, exact, low)


def sequences(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 300) for _ in range(length)] for _ in range(count)]


def capture_all(engine: device_harness.Engine) -> None:
    """As an idle moment would: what is not captured is launched kernel by kernel."""
    while engine.runner.idle():
        pass


@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
@torch.inference_mode()
def test_forced_logits_are_as_near_as_hugging_faces(reference: Reference, use_graphs: bool):
    engine = device_harness.build(reference.folder, CUDA, torch.bfloat16, use_graphs=use_graphs)
    capture_all(engine)
    given = sequences(5, 96)
    chunk = 60
    ours = engine.forced_logits(given, chunk)
    errors, hf_errors = [], []
    for sequence, logits in zip(given, ours, strict=True):
        exact = reference.logits(reference.exact, sequence)[chunk - 1 :]
        errors.append((logits - exact).abs())
        hf_errors.append((reference.logits(reference.low, sequence)[chunk - 1 :] - exact).abs())
    error, hf_error = torch.stack(errors), torch.stack(hf_errors)
    print(f"mean {error.mean():.2e} of {hf_error.mean():.2e}, max {error.max():.2e} of {hf_error.max():.2e}")
    assert error.mean() <= 1.1 * hf_error.mean()
    assert error.max() <= 1.5 * hf_error.max()


@torch.inference_mode()
def test_what_a_crowd_generates_is_what_the_model_prefers(reference: Reference):
    """Prefix hits, preemption, aborts in flight, batch sizes across bucket edges: every token is the best in float32, or as
    good as low precision can tell."""
    tolerance = 2 * reference.worst_error(sequences(2, 80, seed=3))
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    shared = sequences(1, 40, seed=1)[0]
    prompts = [shared + tail for tail in sequences(9, 11, seed=2)] + sequences(8, 23, seed=4)
    aborted = frozenset({2, 11})
    outputs = {}
    for use_graphs in (False, True):
        engine = device_harness.build(
            reference.folder, CUDA, torch.bfloat16, use_graphs=use_graphs, blocks=70, max_num_seqs=17, budget=64
        )
        capture_all(engine)
        outputs[use_graphs] = engine.generate(prompts, sampling, aborted)
        stats = engine.core.stats()
        assert stats.num_referenced_blocks == 0
    assert outputs[True] == outputs[False], "a graph replays what was launched kernel by kernel"
    for index, (prompt, output) in enumerate(zip(prompts, outputs[True], strict=True)):
        assert len(output) == 40 or index in aborted
        logits = reference.logits(reference.exact, prompt + output)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert float((logits.amax(dim=1) - chosen).max()) <= tolerance


@torch.inference_mode()
def test_a_seed_draws_the_same_again(reference: Reference):
    engine = device_harness.build(reference.folder, CUDA, torch.bfloat16, use_graphs=True)
    for sampling in (
        SamplingParams(temperature=0.8, seed=11, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=50, seed=11, max_tokens=24, ignore_eos=True),
    ):
        # Twice the same steps: other steps round differently in low precision, and pages found in the cache make others.
        prompts = sequences(4, 15, seed=5)
        first, again = engine.generate(prompts, sampling), engine.generate(prompts, sampling)
        assert first == again


@torch.inference_mode()
def test_masks_beside_rows_of_the_sampling_kernel(reference: Reference):
    """Steps in which a row has masks sample in general, the others by the kernel: nobody's tokens may tell the difference."""
    engine = device_harness.build(reference.folder, CUDA, torch.bfloat16, use_graphs=True)
    capture_all(engine)
    few = tuple(range(20, 60))
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    masked = {
        "allowed": msgspec.structs.replace(greedy, allowed_token_ids=few),
        "random": msgspec.structs.replace(greedy, allowed_token_ids=few, temperature=1.0, seed=3, typical_p=0.9),
        "bad": msgspec.structs.replace(greedy, bad_words=tuple((token,) for token in range(300) if token not in few)),
    }
    prompts = sequences(2, 15, seed=6)
    alone = engine.generate(prompts, greedy)
    tokens: dict[str, list[int]] = {name: [] for name in (*masked, "r0", "r1")}
    for name, sampling in masked.items():
        short = msgspec.structs.replace(sampling, max_tokens=7)  # so that the last steps are the kernel's again
        engine.core.add(AddRequest(request_id=name, prompt_token_ids=prompts[0], sampling=short))
    for index, prompt in enumerate(prompts):
        engine.core.add(AddRequest(request_id=f"r{index}", prompt_token_ids=prompt, sampling=greedy))
    while engine.core.has_work:
        for output in engine.core.step():
            tokens[output.request_id].extend(output.token_ids)
    assert set(tokens["allowed"]) | set(tokens["random"]) <= set(few) and len(tokens["random"]) == 7
    assert not set(tokens["bad"]) & (set(range(300)) - set(few))
    # Other steps round differently in low precision: what is compared is what the model prefers.
    tolerance = 2 * reference.worst_error(sequences(2, 80, seed=3))
    for index, prompt in enumerate(prompts):
        assert len(tokens[f"r{index}"]) == len(alone[index]) == 12
        logits = reference.logits(reference.exact, prompt + tokens[f"r{index}"])[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens[f"r{index}"])[:, None])[:, 0]
        assert float((logits.amax(dim=1) - chosen).max()) <= tolerance


@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
@torch.inference_mode()
def test_embeddings_are_as_near_as_hugging_faces(reference: Reference, use_graphs: bool):
    """In chunks, from static memory and past it, while others generate."""
    engine = device_harness.build(reference.folder, CUDA, torch.bfloat16, use_graphs=use_graphs, budget=48)
    capture_all(engine)
    prompts = [*sequences(2, 90, seed=8), *sequences(2, 7, seed=9)]
    wishes: list[tuple[list[int], Pooling]] = [(prompt, pooling) for prompt in prompts for pooling in ("mean", "last")]
    generating = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.core.add(AddRequest(request_id="other", prompt_token_ids=prompts[0], sampling=generating))
    for index, (prompt, pooling) in enumerate(wishes):
        none = SamplingParams(max_tokens=0)
        engine.core.add(AddRequest(request_id=f"{index}", prompt_token_ids=prompt, sampling=none, pooling=pooling))
    vectors: dict[str, torch.Tensor] = {}
    while engine.core.has_work:
        for output in engine.core.step():
            if output.embedding is not None:
                vectors[output.request_id] = torch.frombuffer(bytearray(output.embedding), dtype=torch.float32)
    errors, hf_errors = [], []
    for index, (prompt, pooling) in enumerate(wishes):
        exact, low = (reference.pooled(model, prompt, pooling) for model in (reference.exact, reference.low))
        errors.append((vectors[f"{index}"] - exact).norm() / exact.norm())
        hf_errors.append((low - exact).norm() / exact.norm())
    # The median, because a mixture of experts may send one token of eight prompts another way.
    error, hf_error = torch.stack(errors).median(), torch.stack(hf_errors).median()
    print(f"median {error:.2e} of {hf_error:.2e}")
    assert error <= 1.2 * hf_error


@pytest.mark.parametrize("use_graphs", [False, True], ids=["eager", "graphs"])
@torch.inference_mode()
def test_restricted_tokens_and_embeddings(reference: Reference, use_graphs: bool):
    engine = device_harness.build(reference.folder, CUDA, torch.bfloat16, use_graphs=use_graphs, budget=64)
    capture_all(engine)
    if (reference.folder / "tokenizer.json").exists():
        prompts = sequences(6, 30, seed=6)
        restricted_requests.check_schemas_among_free_text(engine, reference.folder, prompts, restricted_requests.OBJECT)
    restricted_requests.check_bad_words(engine, sequences(1, 12, seed=7)[0])  # less than a page: no hit, so the same steps
    restricted_requests.check_embeddings(engine, reference.exact, sequences(5, 90, seed=8), 2e-3)
    engine.core.close()
