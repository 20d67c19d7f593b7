"""What crosses the border between scheduler and device side: plain data about slots, positions and block ids.

A slot is a row of the device's persistent buffers. The scheduler gives each running choice a slot and takes it back; the
device side knows slots, never requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.messages import Pooling, TokenLogprobs
from engine.sampling_params import SamplingParams

SCRATCH_BLOCK_ID = 0
"""A page that is never handed out: padding rows write into it, and tables name it where a page has left the window."""

BAD_TOKEN = -1
"""Stands for the token of a row whose logits were no numbers to choose by."""


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """Layers with equal window and head shape share block tables. bytes_per_block counts keys and values of all its layers.

    window: a query sees itself and the `window - 1` tokens before it; None sees all.
    """

    layer_indices: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None
    bytes_per_block: int


@dataclass(slots=True)
class NewRow:
    """Fills a slot with a choice, before its first step or again after preemption.

    token_ids: all tokens known now, prompt then output. block_ids: one list a KV group, for positions from 0 on
    (SCRATCH_BLOCK_ID where a page is not needed). seed: of the choice. num_computed_tokens: positions already in the pages.
    pooling: how the hidden states of its pooled rows are put together.
    """

    slot: int
    token_ids: npt.NDArray[np.int32]
    num_prompt_tokens: int
    num_computed_tokens: int
    sampling: SamplingParams
    seed: int
    block_ids: tuple[list[int], ...]
    stop_token_ids: tuple[int, ...] = ()
    pooling: Pooling | None = None


@dataclass(slots=True)
class Fork:
    """A further choice that starts from a scheduled row's prompt: its first token is sampled from that row's logits.

    parent_row: index into SchedulerOutput.slots. block_copies: (group, source id, target id), done after the forward:
    the last page, when partly filled, is the only one that is not shared.
    """

    parent_row: int
    row: NewRow
    block_copies: list[tuple[int, int, int]]


@dataclass(slots=True)
class SchedulerOutput:
    """One step. The lists `slots`, `start_positions` and `num_tokens` are parallel, one entry a scheduled row.

    Row r computes positions start_positions[r] .. + num_tokens[r] - 1 of its slot. A token at a position that NewRow did not
    bring is the slot's last sampled token, which the device holds. new_blocks: (slot, ids to append by group), applied before
    the forward. zeroed_blocks: (group, id) of pages that held bad numbers, zeroed before the forward.
    sampled_rows: rows whose last position is sampled. prompt_logprobs_rows: rows that want the logprobs of the prompt tokens
    that follow their positions. pooled_rows: rows whose hidden states are wanted.
    """

    step_id: int
    new_rows: list[NewRow] = field(default_factory=list)
    freed_slots: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, tuple[list[int], ...]]] = field(default_factory=list)
    zeroed_blocks: list[tuple[int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    start_positions: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    prompt_logprobs_rows: list[int] = field(default_factory=list)
    pooled_rows: list[int] = field(default_factory=list)

    @property
    def total_num_tokens(self) -> int:
        return sum(self.num_tokens)


@dataclass(slots=True)
class HostMasks:
    """Token masks made on the host, by scheduled row; they hold for the row's forks too.

    allowed: packed bits, 32 tokens a word (structured output). banned: token ids (bad words of several tokens).
    """

    allowed: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)
    banned: dict[int, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class ModelRunnerOutput:
    """Result of one step, parallel lists: sampled rows in order, then forks in order.

    token_ids: see BAD_TOKEN. logprobs: None where the choice wants none. prompt_logprobs: by scheduled row, one entry a
    position of the chunk whose following token is part of the prompt. pooled: by pooled row, float32 [hidden size]: with "mean"
    the sum over the chunk's positions, with "last" the chunk's last position. bad_rows: scheduled rows whose prompt logprobs
    or pooled vectors are no numbers.
    """

    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    pooled: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    bad_rows: list[int] = field(default_factory=list)


class PendingOutput(Protocol):
    """A step on its way: `wait` blocks until the device is done and returns its result; `done` tells whether it would block."""

    def wait(self) -> ModelRunnerOutput: ...

    def done(self) -> bool: ...


class Runner(Protocol):
    """The device side as the core sees it: the real ModelRunner, or a fake one in tests.

    `launch` and `sample` raise OutOfDeviceMemory where a step does not fit. Its slots are then as the step says (freed, filled
    and extended, forks too), but nothing was sampled or counted: the same positions may be computed again.
    `idle` does a piece of work that can wait for a moment without requests (a pause of at most 50 ms), and says whether there
    is more.
    """

    def launch(self, step: SchedulerOutput) -> None: ...

    def sample(self, masks: HostMasks | None) -> PendingOutput: ...

    def idle(self) -> bool: ...
