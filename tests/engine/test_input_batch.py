"""InputBatch: slots in, step arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.input_batch import InputBatch
from engine.sampling_params import SamplingParams
from engine.sampling_slots import TokenCounts
from engine.step import Fork, HostMasks, NewRow, SchedulerOutput

CPU = torch.device("cpu")
VOCAB = 50


def make_batch(num_groups: int = 1, on_device: bool = False) -> InputBatch:
    return InputBatch(
        num_groups=num_groups,
        max_num_seqs=4,
        max_model_len=32,
        block_size=4,
        vocab_size=VOCAB,
        device=CPU,
        on_device=on_device,
    )


def row_of(slot: int, tokens: list[int], blocks: list[list[int]], num_prompt: int | None = None, **sampling: Any) -> NewRow:
    stop_token_ids = sampling.pop("row_stop_token_ids", ())
    params = SamplingParams(**{"max_tokens": 30, **sampling})
    token_ids = np.array(tokens, dtype=np.int32)
    return NewRow(slot, token_ids, num_prompt or len(tokens), 0, params, 2**63 + slot, tuple(blocks), stop_token_ids)


def step_of(rows: list[tuple[int, int, int]], **fields: Any) -> SchedulerOutput:
    slots, starts, counts = ([row[i] for row in rows] for i in range(3))
    return SchedulerOutput(0, slots=slots, start_positions=starts, num_tokens=counts, **fields)


def test_a_slot_s_table_names_no_page_of_its_last_choice() -> None:
    batch = make_batch(num_groups=2, on_device=True)
    assert batch.feed is not None
    for row, expected in (
        (row_of(1, [10] * 14, [[5, 6, 7, 8], [1, 2, 3, 4]]), ([5, 6, 7, 8, 0], [1, 2, 3, 4, 0])),
        (row_of(1, [20] * 3, [[9], [10]]), ([9, 0, 0, 0, 0], [10, 0, 0, 0, 0])),
    ):
        batch.apply(step_of([], new_rows=[row]))
        batch.feed.send({}, padded_to=1)
        assert tuple(table[1, :5].tolist() for table in batch.feed.tables) == expected


def test_ragged_inputs_of_chunks_and_decodes() -> None:
    batch = make_batch(num_groups=2)
    step = step_of(
        [(2, 0, 3), (0, 2, 4), (3, 1, 1)],
        new_rows=[
            row_of(0, [10, 11, 12, 13, 14, 15], [[5, 6], [7, 0]]),
            row_of(2, [20, 21, 22], [[1], [2]]),
            row_of(3, [30, 31], [[3], [4]]),
        ],
    )
    batch.apply(step)
    inputs = batch.build(step)
    assert inputs.input_ids.tolist() == [[20, 21, 22, 12, 13, 14, 15, 31]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 2, 3, 4, 5, 1]]
    assert inputs.input_ids.dtype == inputs.position_ids.dtype == torch.int64
    assert inputs.row_ends.tolist() == [3, 7, 8]
    assert (inputs.ragged.query_lens, inputs.ragged.context_lens) == ([3, 4, 1], [0, 2, 1])
    tables = [[np.asarray(table).tolist() for table in group] for group in inputs.ragged.block_tables]
    assert tables == [[[1], [5, 6], [3]], [[2], [7, 0], [4]]]


def test_sampled_tokens_come_from_the_device() -> None:
    batch = make_batch()
    batch.apply(step_of([], new_rows=[row_of(0, [10, 11], [[1]]), row_of(1, [20, 21], [[2]])]))
    batch.record([1, 0], torch.tensor([41, 40]))
    step = step_of([(0, 2, 1), (1, 1, 1)])
    assert batch.build(step).input_ids.tolist() == [[40, 21]]
    batch.record([0], torch.tensor([42]))
    step = step_of([(1, 2, 1), (0, 3, 1)])
    assert batch.build(step).input_ids.tolist() == [[41, 42]]
    with pytest.raises(AssertionError, match="only a last token"):
        batch.build(step_of([(0, 2, 2)]))


def test_a_slot_is_filled_again() -> None:
    batch = make_batch()
    knobs: dict[str, Any] = {"logit_bias": {3: 1.0}, "presence_penalty": 1.0, "min_tokens": 9, "stop_token_ids": (4,)}
    batch.apply(step_of([], new_rows=[row_of(1, list(range(20)), [[1, 2, 3, 4, 5]], **knobs)]))
    batch.apply(step_of([], freed_slots=[1], new_rows=[row_of(1, [7, 8, 9], [[9]], num_prompt=2, min_tokens=9)]))
    batch.apply(step_of([], new_blocks=[(1, ([11, 12],))]))
    step = step_of([(1, 0, 3)])
    inputs = batch.build(step)
    assert inputs.input_ids.tolist() == [[7, 8, 9]]
    batch.record([1], torch.tensor([33]))
    (table,) = batch.build(step_of([(1, 8, 1)])).ragged.block_tables[0]
    assert np.asarray(table).tolist() == [9, 11, 12]
    sampling = batch.sampling.take([1], np.array([3]))
    assert (sampling.biases, sampling.banned, sampling.penalties) == ([], [], None)
    assert sampling.output_index.tolist() == [1]


def test_recorded_tokens_are_counted_for_penalties() -> None:
    batch = make_batch()
    rows = [row_of(0, [1], [[1]]), row_of(2, [1, 6], [[2]], num_prompt=1, frequency_penalty=1.0)]
    batch.apply(step_of([], new_rows=rows))
    for token in (6, 8):
        batch.record([0, 2], torch.tensor([9, token]))
    penalties = batch.sampling.take([0, 2], np.array([3, 4])).penalties
    assert penalties is not None and penalties.rows.tolist() == [1]
    counts = penalties.output_counts[int(penalties.state_rows[0])]
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == {6: 2, 8: 1}


def test_forks_fill_their_slots() -> None:
    batch = make_batch()
    fork = Fork(0, row_of(2, [5, 6], [[4]], temperature=0.25), [])
    batch.apply(step_of([(0, 0, 2)], new_rows=[row_of(0, [5, 6], [[1]])], forks=[fork]))
    batch.record([0, 2], torch.tensor([40, 41]))
    assert batch.build(step_of([(2, 2, 1)])).input_ids.tolist() == [[41]]
    assert batch.sampling.take([2], np.array([2])).temperature.tolist() == [0.25]


def test_every_knob_reaches_the_batch() -> None:
    batch = make_batch()
    knobs = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.125,
        "typical_p": 0.375,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
    }
    rows = [
        row_of(0, [1, 2, 3], [[1]]),
        row_of(3, [1, 2, 3], [[2]], num_prompt=1, logprobs=4, min_tokens=4, logit_bias={8: 2.0}, stop_token_ids=(9,), **knobs),
    ]
    rows[1].stop_token_ids = (2, 9)
    batch.apply(step_of([], new_rows=rows))
    sampling = batch.sampling.take([3, 0], np.array([3, 3]))
    for name, value in knobs.items():
        assert getattr(sampling, name)[0] == value and getattr(sampling, name)[1] == getattr(SamplingParams(), name)
    assert sampling.seed.tolist() == [2**63 + 3, 2**63] and sampling.output_index.tolist() == [2, 0]
    assert sampling.num_logprobs.tolist() == [4, -1]
    ((row, ids, values),) = sampling.biases
    assert (row, ids.tolist(), values.tolist()) == (0, [8], [2.0])
    ((row, banned),) = sampling.banned
    assert (row, banned.tolist()) == (0, [2, 9])
    assert sampling.penalties is not None and sampling.penalties.rows.tolist() == [0]
    assert batch.sampling.take([3], np.array([5])).banned == [], "four tokens are out: it may stop now"
    assert batch.sampling.take([0], np.array([3])).penalties is None


def test_masks_of_slots_and_host_reach_the_batch() -> None:
    batch = make_batch()
    rows = [
        row_of(0, [1], [[1]], allowed_token_ids=(4, 7)),
        row_of(1, [1], [[2]], bad_words=((6,), (8, 9))),
        row_of(2, [1], [[3]]),
    ]
    batch.apply(step_of([], new_rows=rows))
    masks = HostMasks(banned={5: [7], 6: [3]})
    sampling = batch.sampling.take([0, 1, 2], np.array([1, 1, 1]), [5, 6, 7], masks)
    assert {row: words.tolist() for row, words in sampling.allowed.items()} == {0: [1 << 4, 0]}
    assert [(row, ids.tolist()) for row, ids in sampling.banned] == [(1, [3, 6])]
    batch.apply(step_of([], freed_slots=[0, 1, 2], new_rows=[row_of(slot, [1], [[1]]) for slot in range(3)]))
    again = batch.sampling.take([0, 1, 2], np.array([1, 1, 1]))
    assert not again.allowed and not again.banned


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({}, "random"),
        ({"min_p": 0.1}, "filtered"),
        ({"bad_words": ((3, 4),)}, "random"),  # depends on the tokens before: the host says in which step
        ({"typical_p": 0.9}, None),
        ({"allowed_token_ids": (3,), "typical_p": 0.9}, None),
        ({"allowed_token_ids": (3,)}, None),
        ({"bad_words": ((3,),)}, None),
        ({"logit_bias": {3: 1.0}}, None),
        ({"logprobs": 0}, None),
        ({"presence_penalty": 0.1}, None),
        ({"min_tokens": 2, "row_stop_token_ids": (5,)}, None),
    ],
)
def test_the_sampling_kernel_serves_plain_logits(sampling: dict[str, Any], mode: str | None) -> None:
    batch = make_batch(on_device=True)
    batch.apply(step_of([], new_rows=[row_of(1, [1, 2], [[1]], temperature=0.0), row_of(3, [1, 2], [[1]], **sampling)]))
    assert batch.sampling.kernel_mode(np.array([1, 3]), np.array([2, 2])) == mode
    assert batch.sampling.kernel_mode(np.array([1]), np.array([2])) == "greedy"
    drawn_by = None if "typical_p" in sampling else mode or "random"
    assert batch.sampling.draw_mode(np.array([1, 3])) == drawn_by, "once the logits are edited"
    batch.apply(step_of([], freed_slots=[3], new_rows=[row_of(3, [1, 2], [[1]])]))
    assert batch.sampling.kernel_mode(np.array([1, 3]), np.array([2, 2])) == "random", "a slot keeps nothing"


def counts_of(counts: TokenCounts, slot: int) -> tuple[list[int], dict[int, int]]:
    state = counts.take([slot])
    assert state is not None
    row = int(state.state_rows[0])
    output = {i: n for i, n in enumerate(state.output_counts[row].tolist()) if n}
    return state.prompt_seen[row].nonzero()[:, 0].tolist(), output


def test_token_counts_follow_the_slots() -> None:
    counts = TokenCounts(VOCAB, CPU)
    prompt, output = np.array([3, 3, 5], dtype=np.int32), np.array([7, 7], dtype=np.int32)
    for slot in range(5):
        counts.fill(slot, prompt + slot, output + slot)
    counts.add([4, 9, 0], torch.tensor([7, 8, 7]))  # slot 9 has no penalties
    assert counts_of(counts, 0) == ([3, 5], {7: 3})
    assert counts_of(counts, 4) == ([7, 9], {7: 1, 11: 2})
    counts.free(0)
    counts.free(9)
    assert counts.take([0]) is None
    counts.fill(0, prompt[:1], output[:0])
    assert counts_of(counts, 0) == ([3], {})
