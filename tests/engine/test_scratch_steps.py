"""Steps that warm a runner up or measure it: of the size asked for, over the scratch page, and all slots given back."""

from __future__ import annotations

import pytest

from engine.scratch_steps import ScratchSteps
from engine.step import SCRATCH_BLOCK_ID, SchedulerOutput


def make(max_num_seqs: int = 4, max_model_len: int = 100) -> ScratchSteps:
    return ScratchSteps(num_groups=2, max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=16)


def check(steps: list[SchedulerOutput], max_model_len: int) -> None:
    """Every position follows the one before it in its slot, has a page, and no slot stays in use."""
    lengths: dict[int, int] = {}
    pages: dict[int, int] = {}
    for step in steps:
        for row in step.new_rows:
            lengths[row.slot] = 0
            pages[row.slot] = 16 * len(row.block_ids[0])
            assert len(row.block_ids) == 2 and {i for ids in row.block_ids for i in ids} == {SCRATCH_BLOCK_ID}
        for slot, start, count in zip(step.slots, step.start_positions, step.num_tokens, strict=True):
            assert start == lengths[slot]
            lengths[slot] += count
            assert lengths[slot] <= min(pages[slot], max_model_len)
        for slot in step.freed_slots:
            del lengths[slot]
    assert not lengths


@pytest.mark.parametrize("max_num_seqs", [1, 2, 8])
@pytest.mark.parametrize("max_model_len", [2, 3, 4, 17, 64, 65, 100])
@pytest.mark.parametrize("mixes", [False, True])
def test_every_kind(max_num_seqs: int, max_model_len: int, mixes: bool) -> None:
    steps = make(max_num_seqs, max_model_len).of_every_kind(64, mixes=mixes)
    check(steps, max_model_len)
    assert any(step.num_tokens == [1] for step in steps), "a decode"
    if mixes and max_num_seqs > 1 and max_model_len >= 66:
        assert [1, 64] in [step.num_tokens for step in steps], "a decode with a prompt"


@pytest.mark.parametrize(
    ("num_tokens", "counts"), [(1, [1]), (99, [99]), (250, [99, 99, 52]), (396, [99] * 4), (8192, [99] * 4)]
)
def test_a_large_step(num_tokens: int, counts: list[int]) -> None:
    steps = make().large(num_tokens)
    check(steps, 100)
    assert steps[0].num_tokens == counts and steps[0].sampled_rows == list(range(len(counts)))
