"""ModelRunner: the device side of a step. `launch` runs the forward and returns at once; `sample` draws the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from engine.attention.base import AttentionBackend
from engine.attention.hf import StepAttention
from engine.input_batch import InputBatch, IntArray, StepInputs, to_device
from engine.messages import TokenLogprobs
from engine.sampler import LogprobsTensors, compute_logprobs, sample
from engine.sampling_params import SamplingParams
from engine.step import SCRATCH_BLOCK_ID, HostMasks, ModelRunnerOutput, NewRow, SchedulerOutput

MAX_PROMPT_LOGITS_ROWS = 256
"""Prompt positions whose logits exist at once: float32 [256, V] is 50 MB at 49,152 tokens and 131 MB at 128,256."""

_WARM_UP_STEP_ID = -1


class _GivenHiddenStates(nn.Module):
    """Stands where a causal model has its decoder, and hands back what it is given."""

    def forward(self, *, inputs_embeds: torch.Tensor, **_ignored: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # the output class with every field a head may pass on


class SplitModel:
    """A Hugging Face causal model in two halves: decoder, then head, each callable for any number of rows.

    The head half is a shallow copy of the model (same weights) whose decoder hands its input through, so that the class's own
    forward makes the logits, with its soft cap or scaling if it has one. Replace modules of the model before, not after.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        prefix = str(model.base_model_prefix)
        self._decoder = getattr(model, prefix)
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, prefix: _GivenHiddenStates()}
        self._vocab_size = vocab_size

    def hidden_states(
        self, input_ids_1T: torch.Tensor, position_ids_1T: torch.Tensor, attention: StepAttention
    ) -> torch.Tensor:
        """Final hidden states [T, hidden size]."""
        output = self._decoder(input_ids=input_ids_1T, position_ids=position_ids_1T, use_cache=False, paged_attention=attention)
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float32 [N, vocab_size] of hidden states [N, hidden size]."""
        logits = self._head(inputs_embeds=hidden_states[None], use_cache=False).logits
        return logits[0, :, : self._vocab_size].float()  # type: ignore[no-any-return]


@dataclass(slots=True)
class _Launched:
    """A step between its two calls. The lists have one entry a token to sample, rows then forks: the slot and position it
    goes to, the scheduled row it comes from, and that row's place in `logits`."""

    step: SchedulerOutput
    slots: list[int]
    positions: IntArray
    source_rows: list[int]
    logits_index: IntArray
    logits: torch.Tensor | None
    prompt_logprobs: dict[int, list[LogprobsTensors]]


class _HostCopies:
    """Results on their way to the host: all copies are queued at once and awaited by one event."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.Event(device) if device.type == "cuda" else None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._event is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def copy_logprobs(self, tensors: LogprobsTensors) -> LogprobsTensors:
        return LogprobsTensors(*(self.copy(x) for x in (tensors.chosen, tensors.ranks, tensors.top_ids, tensors.top_values)))

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


@dataclass(slots=True)
class _Pending:
    """See step.PendingOutput. logprobs: of the rows `logprobs_rows`, of which row i wants num_logprobs[i] best tokens."""

    step_id: int
    token_ids: torch.Tensor | None
    logprobs_rows: list[int]
    num_logprobs: list[int]
    logprobs: LogprobsTensors | None
    prompt_logprobs: dict[int, list[LogprobsTensors]]
    copies: _HostCopies

    def wait(self) -> ModelRunnerOutput:
        """The step's result; blocks until the device is done with it."""
        self.copies.wait()
        token_ids: list[int] = [] if self.token_ids is None else self.token_ids.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self.logprobs is not None:
            for row, entry in zip(self.logprobs_rows, _entries(self.logprobs, self.num_logprobs), strict=True):
                logprobs[row] = entry
        prompt_logprobs = {
            row: [entry for part in parts for entry in _entries(part, [part.top_ids.shape[1]] * len(part.chosen))]
            for row, parts in self.prompt_logprobs.items()
        }
        return ModelRunnerOutput(self.step_id, token_ids, logprobs, prompt_logprobs)


def _entries(tensors: LogprobsTensors, num_best: Sequence[int]) -> list[TokenLogprobs]:
    columns = (x.tolist() for x in (tensors.chosen, tensors.ranks, tensors.top_ids, tensors.top_values))
    return [
        TokenLogprobs(logprob, rank, ids[:k], values[:k])
        for k, logprob, rank, ids, values in zip(num_best, *columns, strict=True)
    ]


class ModelRunner:
    """Runs steps of one model on one device; see step.Runner. Never syncs with the device in `launch` or `sample`.

    model: a Hugging Face causal model, loaded, in eval mode, its attention routed to `attention.hf`. backend: with pages
    allocated. vocab_size: ids at or past it (padding of the embedding) are never sampled. num_groups: KV groups.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: AttentionBackend,
        *,
        vocab_size: int,
        num_groups: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._model = SplitModel(model, vocab_size)
        self._backend = backend
        self._num_groups = num_groups
        self._max_model_len = max_model_len
        self._block_size = block_size
        self._device = device
        self._batch = InputBatch(
            num_groups=num_groups,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=vocab_size,
            device=device,
        )
        self._launched: _Launched | None = None

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput) -> None:
        """Apply the step to the slots and run its forward; every launch is followed by one `sample`."""
        assert self._launched is None, "the step before was not sampled"
        self._batch.apply(step)
        source_rows = step.sampled_rows + [fork.parent_row for fork in step.forks]
        rows, logits_index = np.unique(np.array(source_rows, dtype=np.int64), return_inverse=True)
        logits, prompt_logprobs = None, {}
        if step.slots:
            inputs = self._batch.build(step)
            attention = StepAttention(self._backend, self._backend.prepare(inputs.ragged))
            hidden = self._model.hidden_states(inputs.input_ids, inputs.position_ids, attention)
            if copies := [block_copy for fork in step.forks for block_copy in fork.block_copies]:
                self._backend.copy_blocks(copies)
            if source_rows:
                logits = self._model.logits(hidden[to_device(inputs.row_ends[rows] - 1, self._device)])
            prompt_logprobs = self._prompt_logprobs(step, inputs, hidden)
        self._launched = _Launched(
            step=step,
            slots=[step.slots[row] for row in step.sampled_rows] + [fork.row.slot for fork in step.forks],
            positions=np.array([step.start_positions[row] + step.num_tokens[row] for row in source_rows], dtype=np.int64),
            source_rows=source_rows,
            logits_index=logits_index,
            logits=logits,
            prompt_logprobs=prompt_logprobs,
        )

    def _prompt_logprobs(
        self, step: SchedulerOutput, inputs: StepInputs, hidden: torch.Tensor
    ) -> dict[int, list[LogprobsTensors]]:
        """By row, in parts of bounded size."""
        result = {}
        for row in step.prompt_logprobs_rows:
            count = step.num_tokens[row]
            targets, num_best = self._batch.prompt_targets(step.slots[row], step.start_positions[row], count)
            first = int(inputs.row_ends[row]) - count
            parts = []
            for start in range(0, targets.size, MAX_PROMPT_LOGITS_ROWS):
                wanted = targets[start : start + MAX_PROMPT_LOGITS_ROWS]
                logits = self._model.logits(hidden[first + start : first + start + wanted.size])
                parts.append(compute_logprobs(logits, to_device(wanted, self._device), num_best))
            result[row] = parts
        return result

    @torch.inference_mode()
    def sample(self, masks: HostMasks | None) -> _Pending:
        """Draw the launched step's tokens. A mask of a row holds for its forks too."""
        launched, self._launched = self._launched, None
        assert launched is not None, "no step was launched"
        copies = _HostCopies(self._device)
        pending = _Pending(
            step_id=launched.step.step_id,
            token_ids=None,
            logprobs_rows=[],
            num_logprobs=[],
            logprobs=None,
            prompt_logprobs={
                row: [copies.copy_logprobs(part) for part in parts] for row, parts in launched.prompt_logprobs.items()
            },
            copies=copies,
        )
        if launched.logits is not None:
            self._sample_into(pending, launched, launched.logits, masks)
        copies.record()
        return pending

    def _sample_into(self, pending: _Pending, launched: _Launched, logits: torch.Tensor, masks: HostMasks | None) -> None:
        if not np.array_equal(launched.logits_index, np.arange(len(logits))):
            logits = logits[to_device(launched.logits_index, self._device)]
        batch = self._batch.sampling.take(launched.slots, launched.positions)
        if masks is not None:
            batch.allowed = {i: masks.allowed[row] for i, row in enumerate(launched.source_rows) if row in masks.allowed}
        wants = np.flatnonzero(batch.num_logprobs >= 0)
        wants_rows = to_device(wants, self._device)
        raw = logits[wants_rows] if wants.size else None  # a copy: sampling overwrites logits
        token_ids = sample(logits, batch)
        self._batch.record(launched.slots, token_ids)
        pending.token_ids = pending.copies.copy(token_ids)
        if raw is not None:
            num_best = batch.num_logprobs[wants]
            pending.logprobs_rows, pending.num_logprobs = wants.tolist(), num_best.tolist()
            logprobs = compute_logprobs(raw, token_ids[wants_rows], int(num_best.max()))
            pending.logprobs = pending.copies.copy_logprobs(logprobs)

    def warm_up(self, num_tokens: int = 64) -> None:
        """One prefill of num_tokens (at most the context less one) and one decode, on the scratch page."""
        length = max(1, min(num_tokens, self._max_model_len - 1))
        num_blocks = -(-(length + 1) // self._block_size)
        row = NewRow(
            slot=0,
            token_ids=np.zeros(length, dtype=np.int32),
            num_prompt_tokens=length,
            num_computed_tokens=0,
            sampling=SamplingParams(),
            seed=0,
            block_ids=tuple([SCRATCH_BLOCK_ID] * num_blocks for _ in range(self._num_groups)),
        )
        prefill = SchedulerOutput(
            _WARM_UP_STEP_ID, new_rows=[row], slots=[0], start_positions=[0], num_tokens=[length], sampled_rows=[0]
        )
        decode = SchedulerOutput(_WARM_UP_STEP_ID, slots=[0], start_positions=[length], num_tokens=[1], sampled_rows=[0])
        for step in (prefill, decode, SchedulerOutput(_WARM_UP_STEP_ID, freed_slots=[0])):
            self.launch(step)
            self.sample(None).wait()
