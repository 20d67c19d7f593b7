"""The persistent rows of the device side: what each slot knows, and the arrays that one step is made of.

A slot is written when it is filled and a little in every step; a step's inputs are gathered with numpy, never token by
token. The last sampled token of each slot lives on the device, so that the next step can start before the host has read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import DeviceRows, RaggedBatch
from engine.sampling_slots import SamplingSlots
from engine.step import SCRATCH_BLOCK_ID, NewRow, SchedulerOutput
from engine.step_feed import StepFeed, to_device
from engine.token_masks import IntArray


@dataclass(slots=True)
class StepInputs:
    """What one forward reads. input_ids, position_ids: int64 [1, T] on the device. row_ends: [R], one past each row's last
    token among the T. Where the tokens went to static memory, ids and positions are None."""

    input_ids: torch.Tensor | None
    position_ids: torch.Tensor | None
    ragged: RaggedBatch
    row_ends: IntArray


@dataclass(slots=True)
class _Rows:
    """A step's rows as arrays [R]: slots, first positions, numbers of tokens, one past the last positions."""

    slots: IntArray
    starts: IntArray
    counts: IntArray
    ends: IntArray

    @classmethod
    def of(cls, step: SchedulerOutput) -> _Rows:
        slots, starts, counts = (np.array(x, dtype=np.int64) for x in (step.slots, step.start_positions, step.num_tokens))
        return cls(slots, starts, counts, starts + counts)


class InputBatch:
    """Every slot's tokens, page ids and sampling state. The device has last tokens and penalty counts, the host the rest.

    With on_device the device also keeps block tables and sampling columns (`feed`), and gets a step's rows there;
    static_tokens: see StepFeed's max_tokens.
    """

    def __init__(
        self,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        on_device: bool = False,
        static_tokens: int = 0,
    ) -> None:
        max_blocks = -(-max_model_len // block_size)
        self._device = device
        self._block_size = block_size
        self._token_ids = np.zeros((max_num_seqs, max_model_len), dtype=np.int32)
        self._num_known = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_prompt_logprobs = np.zeros(max_num_seqs, dtype=np.int64)
        self._tables = [np.zeros((max_num_seqs, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        self._num_blocks = np.zeros((num_groups, max_num_seqs), dtype=np.int64)
        self.feed = (
            StepFeed(
                num_groups=num_groups,
                num_slots=max_num_seqs,
                max_blocks=max_blocks,
                max_tokens=static_tokens,
                device=device,
            )
            if on_device
            else None
        )
        self._last_token = (
            torch.zeros(max_num_seqs, dtype=torch.int64, device=device) if self.feed is None else self.feed.last_token
        )
        self.sampling = SamplingSlots(max_num_seqs, vocab_size, device, self.feed)

    def apply(self, step: SchedulerOutput) -> None:
        """Free, fill and extend slots as the step says, forks included."""
        for slot in step.freed_slots:
            self.sampling.free(slot)
        for row in step.new_rows:
            self._fill(row)
        for fork in step.forks:
            self._fill(fork.row)
        for slot, new_ids in step.new_blocks:
            self._append_blocks(slot, new_ids)

    def _fill(self, row: NewRow) -> None:
        slot, count = row.slot, row.token_ids.size
        self._token_ids[slot, :count] = row.token_ids
        self._num_known[slot] = count
        self._num_prompt_tokens[slot] = row.num_prompt_tokens
        self._num_prompt_logprobs[slot] = row.sampling.prompt_logprobs or 0
        num_before = self._num_blocks[:, slot].tolist()
        self._num_blocks[:, slot] = 0
        self._append_blocks(slot, row.block_ids)
        if self.feed is not None:
            # Other people's kernels may read past a row's end and weigh that with zero; what the slot's last choice had there
            # may be a page with another's bad numbers by now, which zero does not make good.
            for group, (ids, before) in enumerate(zip(row.block_ids, num_before, strict=True)):
                self.feed.append_blocks(group, slot, len(ids), [SCRATCH_BLOCK_ID] * (before - len(ids)))
        self.sampling.fill(row)

    def _append_blocks(self, slot: int, ids_by_group: Sequence[list[int]]) -> None:
        for group, ids in enumerate(ids_by_group):
            start = int(self._num_blocks[group, slot])
            self._tables[group][slot, start : start + len(ids)] = ids
            self._num_blocks[group, slot] = start + len(ids)
            if self.feed is not None:
                self.feed.append_blocks(group, slot, start, ids)

    def build(self, step: SchedulerOutput, padded_tokens: int | None = None) -> StepInputs:
        """The inputs of a step's forward; `apply` comes first. padded_tokens: put the tokens into the feed's static memory,
        padded to so many."""
        rows = _Rows.of(step)
        row_ends = np.cumsum(rows.counts)
        row_of_token = np.repeat(np.arange(rows.slots.size), rows.counts)
        positions = np.arange(row_ends[-1]) + (rows.ends - row_ends)[row_of_token]
        known_ids = self._token_ids[rows.slots[row_of_token], positions]
        sampled = np.flatnonzero(rows.ends > self._num_known[rows.slots])
        if sampled.size:
            last_known = np.maximum(rows.starts, self._num_known[rows.slots]) + 1
            assert (last_known == rows.ends)[sampled].all(), "only a last token can be unknown"
        if self.feed is not None:
            known_ids[row_ends[sampled] - 1] = -1
            token_slots = rows.slots[row_of_token]
            return self._build_on_device(self.feed, step, rows, row_ends, (known_ids, positions, token_slots), padded_tokens)
        input_ids = to_device(known_ids.astype(np.int64), self._device)
        if sampled.size:
            device_slots = to_device(rows.slots[sampled], self._device)
            input_ids[to_device(row_ends[sampled] - 1, self._device)] = self._last_token[device_slots]
        return StepInputs(
            input_ids=input_ids[None],
            position_ids=to_device(positions, self._device)[None],
            ragged=RaggedBatch(step.num_tokens, step.start_positions, self._block_tables(step.slots, rows.ends)),
            row_ends=row_ends,
        )

    def _build_on_device(
        self,
        feed: StepFeed,
        step: SchedulerOutput,
        rows: _Rows,
        row_ends: IntArray,
        tokens: tuple[npt.NDArray[np.int32], IntArray, IntArray],
        padded_tokens: int | None,
    ) -> StepInputs:
        """Rows into the feed's static memory; tokens (ids, positions, slots) there too, or into a copy of their own size."""
        num_rows, num_tokens = rows.slots.size, tokens[0].size
        feed.send({"row_slots": rows.slots, "seq_lens": rows.ends, **self._sample_fields(step, rows)}, padded_to=num_rows)
        own_tokens = () if padded_tokens is not None else tokens
        if padded_tokens is not None:
            feed.send_tokens(*tokens, padded_to=padded_tokens)
        parts = (rows.starts, np.zeros(1), row_ends, *own_tokens)
        packed = to_device(np.concatenate(parts).astype(np.int32), self._device)
        context_lens, query_starts, *own = packed.split([num_rows, num_rows + 1, *[num_tokens for _ in own_tokens]])
        input_ids, positions, token_slots = own if own else feed.tokens(num_tokens)
        is_chunk = np.flatnonzero(rows.counts != 1)
        device_rows = DeviceRows(
            block_tables=feed.tables,
            row_slots=feed.field("row_slots", num_rows),
            seq_lens=feed.field("seq_lens", num_rows),
            context_lens=context_lens,
            query_starts=query_starts,
            positions=positions,
            token_slots=token_slots,
            num_decodes=int(is_chunk[0]) if is_chunk.size else num_rows,
        )
        tables = self._block_tables(step.slots, rows.ends)
        return StepInputs(
            input_ids=feed.resolve_ids(input_ids, token_slots)[None] if padded_tokens is None else None,
            position_ids=positions.to(torch.int64)[None] if padded_tokens is None else None,
            ragged=RaggedBatch(step.num_tokens, step.start_positions, tables, device_rows),
            row_ends=row_ends,
        )

    def send_decodes(self, step: SchedulerOutput, padded_to: int) -> None:
        """A step of decodes alone, whose every row is sampled: its rows, into the feed's static memory."""
        assert self.feed is not None
        rows = _Rows.of(step)
        ids = np.where(rows.ends > self._num_known[rows.slots], -1, self._token_ids[rows.slots, rows.starts])
        fields = {"row_slots": rows.slots, "seq_lens": rows.ends, "input_ids": ids, **self._sample_fields(step, rows)}
        self.feed.send(fields, padded_to=padded_to)

    def _sample_fields(self, step: SchedulerOutput, rows: _Rows) -> dict[str, IntArray]:
        """Slots that are sampled for: sampled rows, then forks."""
        slots = rows.slots if len(step.sampled_rows) == rows.slots.size else rows.slots[step.sampled_rows]
        return {"sample_slots": np.append(slots, [fork.row.slot for fork in step.forks]) if step.forks else slots}

    def _block_tables(self, slots: Sequence[int], ends: IntArray) -> tuple[list[Sequence[int]], ...]:
        used = (-(-ends // self._block_size)).tolist()
        # Views of int32 rows: backends turn tables into arrays, and a list would be converted every step.
        return tuple(
            cast("list[Sequence[int]]", [table[slot, :n] for slot, n in zip(slots, used, strict=True)])
            for table in self._tables
        )

    def prompt_targets(self, slot: int, start: int, count: int) -> tuple[IntArray, int]:
        """The prompt tokens that follow positions start .. start + count - 1, and how many best tokens are wanted with them."""
        stop = min(start + count + 1, int(self._num_prompt_tokens[slot]))
        return self._token_ids[slot, start + 1 : stop].astype(np.int64), int(self._num_prompt_logprobs[slot])

    def record(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Note the tokens just sampled, int64 [N] on the device; the sampling kernel does so itself."""
        self._last_token[to_device(np.asarray(slots, dtype=np.int64), self._device)] = token_ids
        self.sampling.add_tokens(slots, token_ids)
