"""Steps for the device that belong to no request: every table names the scratch page, so that they leave nothing behind."""

from __future__ import annotations

import numpy as np

from engine.sampling_params import SamplingParams
from engine.step import SCRATCH_BLOCK_ID, NewRow, SchedulerOutput

_STEP_ID = -1


class ScratchSteps:
    """Makes them for a runner of so many slots, KV groups and tokens of context; to be run one after the other, when no slot is
    in use. The last of a list frees its slots."""

    def __init__(self, *, num_groups: int, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._num_groups = num_groups
        self._num_slots = max_num_seqs
        self._max_model_len = max_model_len
        self._block_size = block_size

    def of_every_kind(self, num_tokens: int, *, mixes: bool) -> list[SchedulerOutput]:
        """A prompt of num_tokens (at most the context less two) in two chunks, a decode, and, where the runner mixes them in a
        way of its own, a decode with a prompt."""
        length = max(1, min(num_tokens, self._max_model_len - 2))
        head = length // 2
        row = self._row(0, length)
        first = [_step([row], [(0, 0, head)], sampled=[])] if head else []
        rest = _step([] if head else [row], [(0, head, length - head)], sampled=[0])
        steps = [*first, rest]
        if self._max_model_len > length:
            steps.append(_step([], [(0, length, 1)], sampled=[0]))
        slots = [0]
        if mixes and self._num_slots > 1 and self._max_model_len > length + 1:
            steps.append(_step([self._row(1, length)], [(0, length + 1, 1), (1, 0, length)], sampled=[0, 1]))
            slots.append(1)
        return [*steps, SchedulerOutput(_STEP_ID, freed_slots=slots)]

    def large(self, num_tokens: int) -> list[SchedulerOutput]:
        """One step of num_tokens, in prompts as long as the context takes."""
        length = min(num_tokens, self._max_model_len - 1)
        counts = [length] * min(num_tokens // length, self._num_slots)
        if len(counts) < self._num_slots and (rest := num_tokens - sum(counts)):
            counts.append(rest)
        rows = [self._row(slot, count) for slot, count in enumerate(counts)]
        spans = [(slot, 0, count) for slot, count in enumerate(counts)]
        slots = list(range(len(rows)))
        return [_step(rows, spans, sampled=slots), SchedulerOutput(_STEP_ID, freed_slots=slots.copy())]

    def _row(self, slot: int, length: int) -> NewRow:
        """A row of `length` tokens whose table, one token longer than it needs, names the scratch page alone."""
        num_blocks = min(-(-(length + 2) // self._block_size), -(-self._max_model_len // self._block_size))
        return NewRow(
            slot=slot,
            token_ids=np.zeros(length, dtype=np.int32),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            sampling=SamplingParams(),
            seed=0,
            block_ids=tuple([SCRATCH_BLOCK_ID] * num_blocks for _ in range(self._num_groups)),
        )


def _step(rows: list[NewRow], spans: list[tuple[int, int, int]], sampled: list[int]) -> SchedulerOutput:
    """A step over (slot, first position, number of tokens)."""
    return SchedulerOutput(
        _STEP_ID,
        new_rows=rows,
        slots=[slot for slot, _, _ in spans],
        start_positions=[start for _, start, _ in spans],
        num_tokens=[count for _, _, count in spans],
        sampled_rows=sampled,
    )
