"""The runner against the model's own forward and `generate`, in float32 on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.attention.base import group_layers
from engine.attention.hf import ATTENTION_NAME, probe_layers, register
from engine.attention.sdpa import SdpaBackend
from engine.messages import Pooling
from engine.model_runner import MAX_PROMPT_LOGITS_ROWS, ModelRunner
from engine.sampling_params import SamplingParams, choice_seed
from engine.split_model import SplitModel
from engine.step import Fork, HostMasks, ModelRunnerOutput, NewRow, SchedulerOutput
from tests import tiny_models

BLOCK_SIZE = 8
NUM_BLOCKS = 128
CONTEXT = 384
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
PROMPTS = [np.random.default_rng(n).integers(5, 300, size=n).astype(np.int32) for n in (3, 17, 30)]


def load(folder: Path, **options: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    model = load(folder)
    model.generation_config.eos_token_id = None  # so that generate goes on
    return model


def make_runner(folder: Path, vocab_size: int = tiny_models.VOCAB_SIZE) -> ModelRunner:
    register()
    model = load(folder, attn_implementation=ATTENTION_NAME)
    layers = probe_layers(model, model.config.num_hidden_layers, CONTEXT)
    groups = group_layers(layers, BLOCK_SIZE, bytes_per_element=4)
    device = torch.device("cpu")
    backend = SdpaBackend(layers, groups, BLOCK_SIZE, torch.float32, device)
    backend.allocate([NUM_BLOCKS] * len(groups))
    return ModelRunner(
        model,
        backend,
        vocab_size=vocab_size,
        num_groups=len(groups),
        max_num_seqs=6,
        max_model_len=CONTEXT,
        block_size=BLOCK_SIZE,
        device=device,
    )


@pytest.fixture
def runner(folder: Path) -> ModelRunner:
    return make_runner(folder)


def new_row(
    slot: int, tokens: Any, sampling: SamplingParams = GREEDY, *, seed: int = 0, num_prompt: int | None = None, room: int = 64
) -> NewRow:
    """A row with pages for `room` tokens and more, a range of ids of its own per slot."""
    token_ids = np.asarray(tokens, dtype=np.int32)
    first = 1 + slot * (NUM_BLOCKS // 6)
    blocks = list(range(first, first + -(-room // BLOCK_SIZE)))[::-1]
    return NewRow(slot, token_ids, num_prompt or token_ids.size, 0, sampling, seed, (blocks,))


def run(runner: ModelRunner, step: SchedulerOutput, masks: HostMasks | None = None) -> ModelRunnerOutput:
    runner.launch(step)
    return runner.sample(masks).wait()


def step_of(rows: list[tuple[int, int, int]], **fields: Any) -> SchedulerOutput:
    """rows: (slot, start, count); all are sampled unless the fields say otherwise."""
    slots, starts, counts = ([row[i] for row in rows] for i in range(3))
    fields.setdefault("sampled_rows", list(range(len(rows))))
    return SchedulerOutput(7, slots=slots, start_positions=starts, num_tokens=counts, **fields)


def decode(runner: ModelRunner, lengths: dict[int, int], count: int) -> dict[int, list[int]]:
    """Tokens of `count` decode steps; lengths: slot -> tokens so far, the last sampled one included."""
    tokens: dict[int, list[int]] = {slot: [] for slot in lengths}
    for i in range(count):
        output = run(runner, step_of([(slot, length - 1 + i, 1) for slot, length in lengths.items()]))
        for slot, token in zip(lengths, output.token_ids, strict=True):
            tokens[slot].append(token)
    return tokens


def generate(reference: Any, prompt: Any, count: int) -> list[int]:
    ids = torch.tensor(np.asarray(prompt)[None], dtype=torch.int64)
    with torch.inference_mode():
        out = reference.generate(ids, max_new_tokens=count, do_sample=False)
    return [int(t) for t in out[0, ids.shape[1] :]]


def test_mixed_batch_of_chunks_and_decodes_equals_generate(runner: ModelRunner, reference: Any) -> None:
    a, b, c = PROMPTS
    first = run(runner, step_of([(0, 0, 3), (1, 0, 10)], new_rows=[new_row(0, a), new_row(1, b)], sampled_rows=[0]))
    # one decode, the rest of b's prompt, and c's first chunk in one step
    second = run(runner, step_of([(0, 3, 1), (1, 10, 7), (2, 0, 11)], new_rows=[new_row(2, c)], sampled_rows=[0, 1]))
    third = run(runner, step_of([(2, 11, 19), (0, 4, 1), (1, 17, 1)]))
    rest = decode(runner, {0: 6, 1: 19, 2: 31}, 5)
    assert [first.token_ids[0], second.token_ids[0], third.token_ids[1], *rest[0]] == generate(reference, a, 8)
    assert [second.token_ids[1], third.token_ids[2], *rest[1]] == generate(reference, b, 7)
    assert [third.token_ids[0], *rest[2]] == generate(reference, c, 6)
    assert first.logprobs == [None] and first.step_id == 7 and first.prompt_logprobs == {}


def test_two_steps_in_flight_feed_tokens_back_without_the_host(runner: ModelRunner, reference: Any) -> None:
    runner.launch(step_of([(0, 0, 30)], new_rows=[new_row(0, PROMPTS[2])]))
    pending = [runner.sample(None)]
    for position in (30, 31):
        runner.launch(step_of([(0, position, 1)]))
        pending.append(runner.sample(None))
    assert [p.wait().token_ids[0] for p in pending] == generate(reference, PROMPTS[2], 3)


def test_blocks_arrive_as_the_row_grows(runner: ModelRunner, reference: Any) -> None:
    row = new_row(0, PROMPTS[0], room=8)
    tokens = run(runner, step_of([(0, 0, 3)], new_rows=[row])).token_ids
    tokens += decode(runner, {0: 4}, 5)[0]
    tokens += run(runner, step_of([(0, 8, 1)], new_blocks=[(0, ([100],))])).token_ids
    assert tokens == generate(reference, PROMPTS[0], 7)


def test_rows_without_samples_give_empty_lists(runner: ModelRunner) -> None:
    output = run(runner, step_of([(0, 0, 2)], new_rows=[new_row(0, PROMPTS[0])], sampled_rows=[]))
    assert (output.token_ids, output.logprobs, output.prompt_logprobs) == ([], [], {})
    output = run(runner, SchedulerOutput(8, freed_slots=[0]))
    assert (output.step_id, output.token_ids) == (8, [])


SAMPLED = SamplingParams(
    temperature=1.3, top_p=0.95, max_tokens=64, presence_penalty=1.0, frequency_penalty=0.7, repetition_penalty=1.2
)


def test_preempted_choice_goes_on_as_if_nothing_had_happened(runner: ModelRunner, folder: Path) -> None:
    prompt = PROMPTS[1]
    tokens = run(runner, step_of([(0, 0, 17)], new_rows=[new_row(0, prompt, SAMPLED, seed=99)])).token_ids
    tokens += decode(runner, {0: 18}, 11)[0]
    other = make_runner(folder)
    known = [*prompt.tolist(), *tokens[:5]]
    # refilled in another slot, in a crowd, with its output so far as known tokens, in two chunks
    crowd = [new_row(s, PROMPTS[2], SAMPLED, seed=s) for s in (0, 1)]
    run(other, step_of([(0, 0, 30), (1, 0, 30)], new_rows=crowd))
    row = new_row(4, known, SAMPLED, seed=99, num_prompt=17)
    run(other, step_of([(0, 30, 1), (4, 0, 9)], new_rows=[row], freed_slots=[1], sampled_rows=[0]))
    output = run(other, step_of([(4, 9, 13), (0, 31, 1)]))
    again = [output.token_ids[0], *decode(other, {4: 23}, 6)[4]]
    assert again == tokens[5:]


Drawn = tuple[list[int], list[float]]


def tokens_and_logprobs(runner: ModelRunner, slots: list[int], start: int, count: int) -> list[Drawn]:
    """By slot, what `count` decode steps sample, beginning with the token at position `start` as input."""
    found: list[Drawn] = [([], []) for _ in slots]
    for position in range(start, start + count):
        output = run(runner, step_of([(slot, position, 1) for slot in slots]))
        for (tokens, logprobs), token, entry in zip(found, output.token_ids, output.logprobs, strict=True):
            assert entry is not None and entry.top_token_ids == []
            tokens.append(token)
            logprobs.append(entry.logprob)
    return found


def test_forks_sample_from_the_parent_s_logits_and_own_their_last_page(runner: ModelRunner, folder: Path) -> None:
    prompt, count = PROMPTS[2], 3  # 30 tokens: three full pages to share and one with six tokens in it
    sampling = SamplingParams(temperature=2.0, n=count, max_tokens=64, logprobs=0)
    parent = new_row(0, prompt, sampling, seed=choice_seed(5, 0))
    (parent_blocks,) = parent.block_ids
    forks = []
    for i in range(1, count):
        row = new_row(i, prompt, sampling, seed=choice_seed(5, i))
        row.block_ids = (parent_blocks[:3] + row.block_ids[0][3:],)
        forks.append(Fork(0, row, [(0, parent_blocks[3], row.block_ids[0][3])]))
    first = run(runner, step_of([(0, 0, 30)], new_rows=[parent], forks=forks)).token_ids
    choices = tokens_and_logprobs(runner, [0, 1, 2], 30, 6)
    assert len({(token, *tokens) for token, (tokens, _) in zip(first, choices, strict=True)}) == count
    other = make_runner(folder)
    for i in range(count):
        row = new_row(i, prompt, sampling, seed=choice_seed(5, i))
        assert run(other, step_of([(i, 0, 30)], new_rows=[row])).token_ids == [first[i]]
        ((tokens, logprobs),) = tokens_and_logprobs(other, [i], 30, 6)
        assert tokens == choices[i][0] and logprobs == pytest.approx(choices[i][1], abs=1e-4)


def test_logprobs_are_of_the_raw_distribution(runner: ModelRunner, reference: Any) -> None:
    prompt = PROMPTS[2]
    plain = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3)
    bent = SamplingParams(temperature=0.7, max_tokens=8, logprobs=1, logit_bias={9: 100.0})
    rows = [new_row(0, prompt, plain), new_row(1, prompt, bent), new_row(2, prompt)]
    output = run(runner, step_of([(0, 0, 30), (1, 0, 30), (2, 0, 30)], new_rows=rows))
    with torch.inference_mode():
        expected = reference(torch.tensor(prompt[None], dtype=torch.int64)).logits[0, -1].log_softmax(-1)
    best = expected.topk(3)
    first, second, third = output.logprobs
    assert first is not None and second is not None and third is None
    assert first.rank == 1 and first.top_token_ids == best.indices.tolist() and first.top_token_ids[0] == output.token_ids[0]
    assert first.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-5) and first.logprob == first.top_logprobs[0]
    assert output.token_ids[1] == 9 and second.logprob == pytest.approx(float(expected[9]), abs=1e-5)
    assert second.rank == int((expected > expected[9]).sum()) + 1 and len(second.top_token_ids) == 1


def test_prompt_logprobs_in_chunks(runner: ModelRunner, reference: Any) -> None:
    prompt = np.random.default_rng(1).integers(5, 300, size=MAX_PROMPT_LOGITS_ROWS + 60).astype(np.int32)
    sampling = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=2)
    row = new_row(0, prompt, sampling, room=360)
    decoding = new_row(5, PROMPTS[0])
    length = prompt.size
    first = run(
        runner,
        step_of([(5, 0, 3), (0, 0, length - 9)], new_rows=[row, decoding], sampled_rows=[0], prompt_logprobs_rows=[1]),
    )
    second = run(runner, step_of([(0, length - 9, 9), (5, 3, 1)], prompt_logprobs_rows=[0]))
    entries = [*first.prompt_logprobs[1], *second.prompt_logprobs[0]]
    with torch.inference_mode():
        expected = reference(torch.tensor(prompt[None], dtype=torch.int64)).logits[0].log_softmax(-1)
    assert len(first.prompt_logprobs[1]) == length - 9 and len(entries) == length - 1
    for position, entry in enumerate(entries):
        row_logprobs, token = expected[position], int(prompt[position + 1])
        assert entry.logprob == pytest.approx(float(row_logprobs[token]), abs=1e-4)
        assert entry.rank == int((row_logprobs > row_logprobs[token]).sum()) + 1
        assert entry.top_logprobs == pytest.approx(row_logprobs.topk(2).values.tolist(), abs=1e-4)
    assert second.token_ids[0] == int(expected[-1].argmax())


def test_host_masks_hold_for_their_row_and_its_forks(runner: ModelRunner) -> None:
    prompt = PROMPTS[1]
    allowed = np.zeros(tiny_models.VOCAB_SIZE // 32, dtype=np.int32)
    allowed[2] = 1 << 5  # token 69 alone
    parent, other = new_row(0, prompt), new_row(1, prompt)
    fork = Fork(0, new_row(2, prompt, SAMPLED), [(0, parent.block_ids[0][2], new_row(2, prompt).block_ids[0][2])])
    step = step_of([(0, 0, 17), (1, 0, 17)], new_rows=[parent, other], forks=[fork])
    output = run(runner, step, HostMasks({0: allowed}))
    assert output.token_ids[0] == output.token_ids[2] == 69 != output.token_ids[1]


def test_host_bans_hold_for_their_row_and_its_forks(runner: ModelRunner, reference: Any) -> None:
    prompt = PROMPTS[1]
    with torch.inference_mode():
        best, second = reference(torch.tensor(prompt[None], dtype=torch.int64)).logits[0, -1].topk(2).indices.tolist()
    parent, other = new_row(0, prompt), new_row(1, prompt)
    fork = Fork(0, new_row(2, prompt), [(0, parent.block_ids[0][2], new_row(2, prompt).block_ids[0][2])])
    step = step_of([(0, 0, 17), (1, 0, 17)], new_rows=[parent, other], forks=[fork])
    assert run(runner, step, HostMasks(banned={0: [best]})).token_ids == [second, best, second]


def test_masks_of_a_choice_hold_for_all_its_tokens_and_for_no_other(runner: ModelRunner, reference: Any) -> None:
    """Greedy, so that ignoring one of them would show: the best tokens of the plain row are not to be had."""
    prompt, count = PROMPTS[2], 6
    plain = generate(reference, prompt, count)
    few = tuple(range(100, 110))
    knobs: list[dict[str, Any]] = [
        {},
        {"allowed_token_ids": few},
        {"bad_words": tuple((token,) for token in set(plain))},
        {"allowed_token_ids": few, "bad_words": tuple((token,) for token in few[1:])},
    ]
    rows = [new_row(slot, prompt, SamplingParams(temperature=0.0, max_tokens=64, **knob)) for slot, knob in enumerate(knobs)]
    first = run(runner, step_of([(slot, 0, 30) for slot in range(4)], new_rows=rows)).token_ids
    rest = decode(runner, dict.fromkeys(range(4), 31), count - 1)
    tokens = [[token, *rest[slot]] for slot, token in enumerate(first)]
    assert tokens[0] == plain
    assert set(tokens[1]) <= set(few) and not set(tokens[2]) & set(plain) and tokens[3] == [few[0]] * count
    # each is what the logits say, masked
    known = torch.tensor([prompt.tolist() + tokens[2]], dtype=torch.int64)
    with torch.inference_mode():
        logits = reference(known).logits[0, len(prompt) - 1 : -1]
        logits[:, plain] = float("-inf")
    assert tokens[2] == logits.argmax(-1).tolist()


def test_typical_p_reaches_the_sampler(runner: ModelRunner, reference: Any) -> None:
    """With a mass of almost nothing only the most typical token is left, whatever the seed."""
    prompt = PROMPTS[1]
    with torch.inference_mode():
        logprobs = reference(torch.tensor(prompt[None], dtype=torch.int64)).logits[0, -1].log_softmax(-1)
    typical = int((logprobs - (logprobs.exp() * logprobs).sum()).abs().argmin())
    assert typical != int(logprobs.argmax())
    rows = [new_row(slot, prompt, SamplingParams(typical_p=1e-6), seed=slot) for slot in range(3)]
    assert run(runner, step_of([(slot, 0, 17) for slot in range(3)], new_rows=rows)).token_ids == [typical] * 3


def pooled(runner: ModelRunner, pooling: Pooling, prompt: Any, cuts: list[int], slot: int = 3) -> np.ndarray:
    """The vectors of a prompt's chunks, put together as the scheduler does; a plain row decodes beside it all the while."""
    total, start = np.zeros(64, dtype=np.float32), 0
    row = new_row(slot, prompt, SamplingParams(max_tokens=0), room=len(prompt))
    row.pooling = pooling
    run(runner, step_of([(0, 0, 3)], new_rows=[new_row(0, PROMPTS[0])]))
    for i, end in enumerate([*cuts, len(prompt)]):
        step = step_of(
            [(0, 3 + i, 1), (slot, start, end - start)],
            new_rows=[row] if start == 0 else [],
            sampled_rows=[0],
            pooled_rows=[1],
        )
        output = run(runner, step)
        assert list(output.pooled) == [1] and len(output.token_ids) == 1
        vector = output.pooled[1]
        assert vector.dtype == np.float32 and vector.shape == (64,)
        total, start = (total + vector if pooling == "mean" else vector), end
    return total / len(prompt) if pooling == "mean" else total


@pytest.mark.parametrize("cuts", [[], [1], [16], [5, 6, 29]])
def test_pooled_hidden_states_are_hugging_face_s(runner: ModelRunner, reference: Any, cuts: list[int]) -> None:
    prompt = PROMPTS[2]
    with torch.inference_mode():
        output = reference(torch.tensor(prompt[None], dtype=torch.int64), output_hidden_states=True)
    states = output.hidden_states[-1][0].numpy()
    assert pooled(runner, "mean", prompt, cuts) == pytest.approx(states.mean(0), abs=1e-5)
    run(runner, SchedulerOutput(1, freed_slots=[0, 3]))
    assert pooled(runner, "last", prompt, cuts) == pytest.approx(states[-1], abs=1e-5)
    run(runner, SchedulerOutput(1, freed_slots=[0, 3]))
    plain = run(runner, step_of([(3, 0, 30)], new_rows=[new_row(3, prompt)]))
    assert plain.pooled == {}, "the slot keeps nothing"


def test_pooled_rows_of_both_kinds_in_one_step(runner: ModelRunner, reference: Any) -> None:
    rows = [new_row(slot, prompt, SamplingParams(max_tokens=0)) for slot, prompt in enumerate(PROMPTS)]
    rows[0].pooling, rows[1].pooling, rows[2].pooling = "mean", "last", "mean"
    spans = [(slot, 0, len(prompt)) for slot, prompt in enumerate(PROMPTS)]
    output = run(runner, step_of(spans, new_rows=rows, sampled_rows=[], pooled_rows=[0, 2, 1]))
    assert sorted(output.pooled) == [0, 1, 2]
    for slot, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            states = reference.model(torch.tensor(prompt[None], dtype=torch.int64)).last_hidden_state[0].numpy()
        expected = states[-1] if slot == 1 else states.sum(0)
        assert output.pooled[slot] == pytest.approx(expected, abs=1e-4)


def test_ids_past_the_vocabulary_are_never_sampled(folder: Path, reference: Any) -> None:
    prompt = PROMPTS[1]
    with torch.inference_mode():
        logits = reference(torch.tensor(prompt[None], dtype=torch.int64)).logits[0, -1]
    vocab_size = int(logits.argmax())  # the best token is the first that is no token; any remainder by four
    runner = make_runner(folder, vocab_size)
    rows = [new_row(0, prompt), new_row(1, prompt, SamplingParams(temperature=0.01))]
    output = run(runner, step_of([(0, 0, 17), (1, 0, 17)], new_rows=rows))
    assert output.token_ids == [int(logits[:vocab_size].argmax())] * 2


def test_warm_up_leaves_no_trace(runner: ModelRunner, reference: Any) -> None:
    runner.warm_up()
    tokens = run(runner, step_of([(0, 0, 17)], new_rows=[new_row(0, PROMPTS[1])])).token_ids
    assert [*tokens, *decode(runner, {0: 18}, 3)[0]] == generate(reference, PROMPTS[1], 4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def test_split_model_makes_the_model_s_own_logits(name: str, tmp_path: Path) -> None:
    model = load(tiny_models.build(name, tmp_path))
    ids = torch.tensor([[5, 9, 33, 100, 7]])
    with torch.inference_mode():
        expected = model(ids).logits[0]
        hidden = model.model(ids).last_hidden_state[0]
        split = SplitModel(model, tiny_models.VOCAB_SIZE)
        assert torch.equal(split.logits(hidden), expected)
        assert torch.allclose(split.logits(hidden[2:3]), expected[2:3], atol=1e-5)
        assert torch.equal(model(ids).logits[0], expected), "the model itself is left as it was"
