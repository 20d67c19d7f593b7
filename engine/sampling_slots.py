"""The sampling parameters of every slot, and what the rows of one step need of them.

Columns are written when a slot is filled; a step gathers its rows from them with numpy, never token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.step import HostMasks, NewRow
from engine.step_feed import StepFeed, to_device
from engine.token_masks import IntArray, TokenMasks, Words

FloatArray = npt.NDArray[np.float32]
SeedArray = npt.NDArray[np.uint64]

_FLOAT_COLUMNS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_NO_MASKS = HostMasks()


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

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 are off. seed: of the choice, 64 bits. output_index:
    output tokens the choice has so far. num_logprobs: best tokens wanted beside the chosen one, -1 for none at all.
    biases: (row, token ids, values). banned: (row, token ids). allowed: row -> packed bits (see token_masks.Words).
    """

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray
    typical_p: FloatArray
    repetition_penalty: FloatArray
    presence_penalty: FloatArray
    frequency_penalty: FloatArray
    seed: SeedArray
    output_index: IntArray
    num_logprobs: IntArray
    biases: list[tuple[int, IntArray, FloatArray]] = field(default_factory=list)
    banned: list[tuple[int, IntArray]] = field(default_factory=list)
    allowed: Mapping[int, Words] = field(default_factory=dict)
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
        self._needs_host = np.zeros(num_slots, dtype=np.bool_)  # wants what the sampling kernel does not do
        self._floats = {name: np.zeros(num_slots, dtype=np.float32) for name in _FLOAT_COLUMNS}
        self._top_k, self._min_tokens, self._num_prompt_tokens, self._num_logprobs = np.zeros((4, num_slots), dtype=np.int64)
        self._seed = np.zeros(num_slots, dtype=np.uint64)
        self._biases: dict[int, tuple[IntArray, FloatArray]] = {}
        self._masks = TokenMasks(vocab_size)
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
        self._masks.fill(row)
        if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            self._counts.fill(slot, row.token_ids[: row.num_prompt_tokens], row.token_ids[row.num_prompt_tokens :])
        if self._feed is not None:
            self._needs_host[slot] = (
                sampling.logprobs is not None or bool(sampling.logit_bias) or slot in self._masks or slot in self._counts
            )
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
        self._masks.free(slot)
        self._counts.free(slot)

    def output_index(self, slots: IntArray, positions: IntArray) -> IntArray:
        """Output tokens before each of the tokens at `positions`."""
        return positions - self._num_prompt_tokens[slots]

    def kernel_mode(self, slots: IntArray, positions: IntArray) -> str | None:
        """The form of the sampling kernel (see `draw_mode`) that serves these rows from plain logits; None where a row needs
        what only the general path has."""
        if self._needs_host[slots].any():
            return None
        if stop_ids := self._masks.stop_ids:
            too_short = self.output_index(slots, positions) < self._min_tokens[slots]
            if any(slot in stop_ids for slot in slots[too_short].tolist()):
                return None
        return self.draw_mode(slots)

    def draw_mode(self, slots: IntArray) -> str | None:
        """Which form of the sampling kernel draws for these rows once their logits are edited: "greedy", "random" (Gumbel
        noise), "filtered" (top_k, top_p or min_p too); None for typical_p, which it does not know."""
        is_random = self._floats["temperature"][slots] > 0
        if not is_random.any():
            return "greedy"
        if (is_random & (self._floats["typical_p"][slots] < 1)).any():
            return None
        top_k, top_p, min_p = self._top_k[slots], self._floats["top_p"][slots], self._floats["min_p"][slots]
        return "filtered" if (is_random & ((top_k > 0) | (top_p < 1) | (min_p > 0))).any() else "random"

    def take(
        self,
        slots: Sequence[int],
        positions: IntArray,
        source_rows: Sequence[int] = (),
        masks: HostMasks | None = None,
    ) -> SamplingBatch:
        """The knobs of the rows that sample now: row i draws the token at positions[i] of slots[i].

        masks: the host's, which hold for the rows i whose source_rows[i] they name.
        """
        index = np.asarray(slots, dtype=np.int64)
        output_index = positions - self._num_prompt_tokens[index]
        too_short = np.flatnonzero(output_index < self._min_tokens[index]).tolist()
        banned, allowed = self._masks.take(slots, too_short, source_rows, masks or _NO_MASKS)
        floats: dict[str, Any] = {name: column[index] for name, column in self._floats.items()}
        return SamplingBatch(
            **floats,
            top_k=self._top_k[index],
            seed=self._seed[index],
            output_index=output_index,
            num_logprobs=self._num_logprobs[index],
            biases=[(row, *self._biases[slot]) for row, slot in enumerate(slots) if slot in self._biases],
            banned=banned,
            allowed=allowed,
            penalties=self._counts.take(slots),
        )

    def add_tokens(self, slots: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count the tokens that were just sampled."""
        self._counts.add(slots, token_ids)
