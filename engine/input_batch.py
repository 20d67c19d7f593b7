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

from engine.attention.base import DeviceRows, RaggedBatch
from engine.step import NewRow, SchedulerOutput
from engine.step_feed import StepFeed, to_device

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
SeedArray = npt.NDArray[np.uint64]

_FLOAT_COLUMNS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


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

    def __contains__(self, slot: int) -> bool:
        return slot in self._state_rows

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
    """The sampling parameters of every slot as columns, written when a slot is filled.

    feed: where a device keeps the columns of its own sampling kernel, if it has one.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, feed: StepFeed | None = None) -> None:
        self._feed = feed
        self._needs_host = np.zeros(num_slots, dtype=np.bool_)  # biases, penalties, logprobs: not in the sampling kernel
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
        if self._feed is not None:
            self._needs_host[slot] = sampling.logprobs is not None or bool(sampling.logit_bias) or slot in self._counts
            self._feed.set_sampling(
                slot,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=row.seed,
                output_index=row.token_ids.size - row.num_prompt_tokens,
            )

    def free(self, slot: int) -> None:
        self._biases.pop(slot, None)
        self._stop_ids.pop(slot, None)
        self._counts.free(slot)

    def output_index(self, slots: IntArray, positions: IntArray) -> IntArray:
        """Output tokens before each of the tokens at `positions`."""
        return positions - self._num_prompt_tokens[slots]

    def kernel_mode(self, slots: IntArray, positions: IntArray) -> str | None:
        """Which form of the sampling kernel serves these rows: "greedy", "random" (Gumbel noise), "filtered" (top_k, top_p or
        min_p too); None where a row needs what only the general path has."""
        if self._needs_host[slots].any():
            return None
        if self._stop_ids:
            too_short = self.output_index(slots, positions) < self._min_tokens[slots]
            if any(slot in self._stop_ids for slot in slots[too_short].tolist()):
                return None
        is_random = self._floats["temperature"][slots] > 0
        if not is_random.any():
            return "greedy"
        top_k, top_p, min_p = self._top_k[slots], self._floats["top_p"][slots], self._floats["min_p"][slots]
        return "filtered" if (is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any() else "random"

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
        self._num_blocks[:, slot] = 0
        self._append_blocks(slot, row.block_ids)
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
