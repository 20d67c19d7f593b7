"""The persistent rows of the device side: what each slot knows, and the arrays that one step is made of.

A slot is written when it is filled and a little in every step; a step's inputs are gathered with numpy, never token by
token. The last sampled token of each slot lives on the device, so that the next step can start before the host has read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import RaggedBatch
from engine.step import NewRow, SchedulerOutput

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
SeedArray = npt.NDArray[np.uint64]

_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Shares memory on a CPU; elsewhere copies through pinned memory, which torch reuses only when the copy is done."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(slots=True)
class PenaltyRows:
    """Token counts of the rows that use penalties. rows: [P]; state_rows: [P], rows of the two state tensors.

    prompt_seen: bool [*, V]. output_counts: int32 [*, V].
    """

    rows: IntArray
    state_rows: IntArray
    prompt_seen: torch.Tensor
    output_counts: torch.Tensor


@dataclass(slots=True)
class SamplingBatch:
    """The knobs of N rows, host side, as arrays [N]; sparse ones as (row, ...) for the rows that have them.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. seed: of the choice, 64 bits. output_index: output tokens
    the choice has so far. num_logprobs: best tokens wanted beside the chosen one, -1 for none at all.
    biases: (row, token ids, values). banned: (row, token ids). allowed: row -> packed bits, 32 tokens a word.
    """

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray
    repetition_penalty: FloatArray
    presence_penalty: FloatArray
    frequency_penalty: FloatArray
    seed: SeedArray
    output_index: IntArray
    num_logprobs: IntArray
    biases: list[tuple[int, IntArray, FloatArray]] = field(default_factory=list)
    banned: list[tuple[int, IntArray]] = field(default_factory=list)
    allowed: Mapping[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    penalties: PenaltyRows | None = None


class TokenCounts:
    """How often each token occurred, on the device, for the slots that use penalties; memory grows with their number."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._state_rows: dict[int, int] = {}  # slot -> row of the tensors below
        self._free_rows: list[int] = []
        self._prompt_seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._output_counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)

    def fill(self, slot: int, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> None:
        """Count a slot's tokens afresh."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self._state_rows[slot] = row
        counts = [np.bincount(tokens, minlength=self._vocab_size).astype(np.int32) for tokens in (prompt, output)]
        self._prompt_seen[row] = to_device(counts[0] > 0, self._device)
        self._output_counts[row] = to_device(counts[1], self._device)

    def _grow(self) -> None:
        old = self._prompt_seen.shape[0]
        more = max(old, 1)
        self._prompt_seen, self._output_counts = (
            torch.cat([state, state.new_zeros(more, self._vocab_size)]) for state in (self._prompt_seen, self._output_counts)
        )
        self._free_rows = list(range(old + more - 1, old - 1, -1))

    def free(self, slot: int) -> None:
        row = self._state_rows.pop(slot, None)
        if row is not None:
            self._free_rows.append(row)

    def take(self, slots: Sequence[int]) -> PenaltyRows | None:
        """The state of the rows among `slots` that use penalties."""
        rows = [row for row, slot in enumerate(slots) if slot in self._state_rows] if self._state_rows else []
        if not rows:
            return None
        state_rows = np.array([self._state_rows[slots[row]] for row in rows])
        return PenaltyRows(np.array(rows), state_rows, self._prompt_seen, self._output_counts)

    def add(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """One more output token for each slot, [N]."""
        state = self.take(slots)
        if state is not None:
            tokens = token_ids[to_device(state.rows, self._device)]
            self._output_counts[to_device(state.state_rows, self._device), tokens] += 1


class SamplingSlots:
    """The sampling parameters of every slot as columns, written when a slot is filled."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._floats = {name: np.zeros(num_slots, dtype=np.float32) for name in _FLOAT_COLUMNS}
        self._top_k, self._min_tokens, self._num_prompt_tokens, self._num_logprobs = np.zeros((4, num_slots), dtype=np.int64)
        self._seed = np.zeros(num_slots, dtype=np.uint64)
        self._biases: dict[int, tuple[IntArray, FloatArray]] = {}
        self._stop_ids: dict[int, IntArray] = {}
        self._counts = TokenCounts(vocab_size, device)

    def fill(self, row: NewRow) -> None:
        sampling, slot = row.sampling, row.slot
        for name, column in self._floats.items():
            column[slot] = getattr(sampling, name)
        self._top_k[slot] = sampling.top_k
        self._min_tokens[slot] = sampling.min_tokens
        self._num_prompt_tokens[slot] = row.num_prompt_tokens
        self._num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._seed[slot] = row.seed
        if sampling.logit_bias:
            ids = np.array(list(sampling.logit_bias), dtype=np.int64)
            self._biases[slot] = ids, np.array(list(sampling.logit_bias.values()), dtype=np.float32)
        stop_ids = {*row.stop_token_ids, *sampling.stop_token_ids}
        if sampling.min_tokens and stop_ids:
            self._stop_ids[slot] = np.array(sorted(stop_ids), dtype=np.int64)
        if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            self._counts.fill(slot, row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :])

    def free(self, slot: int) -> None:
        self._biases.pop(slot, None)
        self._stop_ids.pop(slot, None)
        self._counts.free(slot)

    def take(self, slots: Sequence[int], positions: IntArray) -> SamplingBatch:
        """The knobs of the rows that sample now: row i draws the token at positions[i] of slots[i]."""
        index = np.asarray(slots, dtype=np.int64)
        output_index = positions - self._num_prompt_tokens[index]
        too_short = np.flatnonzero(output_index < self._min_tokens[index]).tolist()
        floats: dict[str, Any] = {name: column[index] for name, column in self._floats.items()}
        return SamplingBatch(
            **floats,
            top_k=self._top_k[index],
            seed=self._seed[index],
            output_index=output_index,
            num_logprobs=self._num_logprobs[index],
            biases=[(row, *self._biases[slot]) for row, slot in enumerate(slots) if slot in self._biases],
            banned=[(row, self._stop_ids[slots[row]]) for row in too_short if slots[row] in self._stop_ids],
            penalties=self._counts.take(slots),
        )

    def add_tokens(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count the tokens that were just sampled."""
        self._counts.add(slots, token_ids)


@dataclass(slots=True)
class StepInputs:
    """What one forward reads. input_ids, position_ids: int64 [1, T] on the device. row_ends: [R], one past each row's last
    token among the T."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    ragged: RaggedBatch
    row_ends: IntArray


class InputBatch:
    """Every slot's tokens, page ids and sampling state. The device has last tokens and penalty counts, the host the rest."""

    def __init__(
        self,
        *,
        num_groups: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
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
        self._last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.sampling = SamplingSlots(max_num_seqs, vocab_size, device)

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
        self._num_blocks[:, slot] = 0
        self._append_blocks(slot, row.block_ids)
        self.sampling.fill(row)

    def _append_blocks(self, slot: int, ids_by_group: Sequence[list[int]]) -> None:
        for table, num_blocks, ids in zip(self._tables, self._num_blocks, ids_by_group, strict=True):
            start = num_blocks[slot]
            table[slot, start : start + len(ids)] = ids
            num_blocks[slot] = start + len(ids)

    def build(self, step: SchedulerOutput) -> StepInputs:
        """The inputs of a step's forward; `apply` comes first."""
        slots, starts, counts = (np.array(x, dtype=np.int64) for x in (step.slots, step.start_positions, step.num_tokens))
        row_ends = np.cumsum(counts)
        rows = np.repeat(np.arange(slots.size), counts)
        positions = np.arange(row_ends[-1]) + (starts + counts - row_ends)[rows]
        input_ids = to_device(self._token_ids[slots[rows], positions].astype(np.int64), self._device)
        ends = starts + counts
        sampled = np.flatnonzero(ends > self._num_known[slots])
        if sampled.size:
            assert (np.maximum(starts, self._num_known[slots]) + 1 == ends)[sampled].all(), "only a last token can be unknown"
            device_slots = to_device(slots[sampled], self._device)
            input_ids[to_device(row_ends[sampled] - 1, self._device)] = self._last_token[device_slots]
        return StepInputs(
            input_ids=input_ids[None],
            position_ids=to_device(positions, self._device)[None],
            ragged=RaggedBatch(step.num_tokens, step.start_positions, self._block_tables(step.slots, ends)),
            row_ends=row_ends,
        )

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
        """Note the tokens just sampled, int64 [N] on the device."""
        self._last_token[to_device(np.asarray(slots, dtype=np.int64), self._device)] = token_ids
        self.sampling.add_tokens(slots, token_ids)
