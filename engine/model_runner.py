"""ModelRunner: the device side of a step. `launch` runs the forward and returns at once; `sample` draws the tokens.

On a GPU a step of decodes alone runs from static memory (`step_feed.py`), padded to a bucket of rows, as one CUDA graph once
there is one for the bucket; sampling has graphs of its own. A step with prompt chunks runs in pieces, between which attention
is launched by itself: up to MAX_GRAPH_TOKENS, padded to a bucket of tokens, the pieces are graphs too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from engine.attention.base import AttentionBackend, RaggedBatch
from engine.attention.hf import StepAttention
from engine.cuda_graphs import CudaGraphs
from engine.errors import OutOfDeviceMemory
from engine.fused_decoder import Activations, FusedDecoder
from engine.input_batch import InputBatch, StepInputs
from engine.kernels.sampling import SamplingWorkspace, sample_tokens
from engine.memory_plan import MAX_GRAPH_TOKENS, graph_batch_sizes, graph_token_counts
from engine.native_decoder import NativeDecoder
from engine.pooler import Pooler
from engine.sampler import LogprobsTensors, compute_logprobs, edit, sample
from engine.scratch_steps import ScratchSteps
from engine.split_model import SplitModel
from engine.step import HostMasks, SchedulerOutput
from engine.step_feed import to_device
from engine.step_results import HostCopies, PendingStep
from engine.token_masks import IntArray

MAX_PROMPT_LOGITS_ROWS = 256
"""Prompt positions whose logits exist at once: float32 [256, V] is 50 MB at 49,152 tokens and 131 MB at 128,256."""


@dataclass(slots=True)
class _Launched:
    """A step between its two calls. The lists have one entry a token to sample, rows then forks: the slot and position it
    goes to, the scheduled row it comes from, and that row's place in `logits`. logits: in the head's dtype. pooled: see
    Pooler.pool. bucket: rows that the step was padded to, where it ran from static memory."""

    step: SchedulerOutput
    slots: list[int]
    positions: IntArray
    source_rows: list[int]
    logits_index: IntArray
    logits: torch.Tensor | None
    prompt_logprobs: dict[int, list[LogprobsTensors]]
    pooled: torch.Tensor | None = None
    bucket: int | None = None


class ModelRunner:
    """Runs steps of one model on one device; see step.Runner. Never syncs with the device in `launch` or `sample`.

    model: a Hugging Face causal model, loaded, in eval mode, its attention routed to `attention.hf`; fused: its decoder in
    fused form, if there is one. backend: with pages allocated. vocab_size: ids at or past it (padding of the embedding) are
    never sampled. num_groups: KV groups. on_device: the device keeps block tables and samples with its own kernel (a GPU).
    use_graphs: whether steps of decodes are captured as CUDA graphs.
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
        fused: FusedDecoder | NativeDecoder | None = None,
        on_device: bool = False,
        use_graphs: bool = False,
    ) -> None:
        self._model = SplitModel(model, vocab_size, fused)
        self._backend = backend
        self._device = device
        self._scratch_steps = ScratchSteps(
            num_groups=num_groups, max_num_seqs=max_num_seqs, max_model_len=max_model_len, block_size=block_size
        )
        self._batch = InputBatch(
            num_groups=num_groups,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_size=block_size,
            vocab_size=vocab_size,
            device=device,
            on_device=on_device,
            static_tokens=MAX_GRAPH_TOKENS,
        )
        self._pooler = Pooler()
        self._launched: _Launched | None = None
        self._buckets = graph_batch_sizes(max_num_seqs)
        self._token_buckets = graph_token_counts()
        self._graphs = CudaGraphs(device) if use_graphs and on_device and backend.graphs else None
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._static = Activations.zeros(MAX_GRAPH_TOKENS, fused.layers[0]) if isinstance(fused, FusedDecoder) else None
        if on_device:
            dtype = next(model.parameters()).dtype
            self._logits = torch.empty(max_num_seqs, vocab_size, dtype=dtype, device=device)
            self._token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
            self._sampling_workspace = SamplingWorkspace.create(max_num_seqs, vocab_size, device)

    @torch.inference_mode()
    def launch(self, step: SchedulerOutput) -> None:
        """Apply the step to the slots and run its forward; every launch is followed by one `sample`.

        Raises OutOfDeviceMemory where the forward does not fit: no token was sampled, and the same rows may be launched again.
        """
        assert self._launched is None, "the step before was not sampled"
        if self._graphs is not None:
            self._graphs.begin_step()
        with _out_of_memory_raised_as_ours(step):
            if step.zeroed_blocks:
                self._backend.zero_blocks(step.zeroed_blocks)
            self._batch.apply(step)
            self._pooler.fill(step.new_rows)
            if self._batch.feed is not None and _is_decodes_alone(step):
                self._launched = self._launch_decodes(step)
            else:
                self._launched = self._launch_any(step)

    def _launch_decodes(self, step: SchedulerOutput) -> _Launched:
        num_rows = len(step.slots)
        bucket = next(size for size in self._buckets if size >= num_rows)
        self._batch.send_decodes(step, padded_to=bucket)
        self._run(("decode", bucket), lambda: self._decode(bucket))
        return _Launched(
            step=step,
            slots=step.slots,
            positions=np.array(step.start_positions, dtype=np.int64) + 1,
            source_rows=step.sampled_rows,
            logits_index=np.arange(num_rows),
            logits=self._logits[:num_rows],
            prompt_logprobs={},
            bucket=bucket,
        )

    def _run(self, key: Hashable, work: Callable[[], None]) -> None:
        if self._graphs is None:
            work()
        else:
            self._graphs.run(key, work)

    def _decode(self, bucket: int) -> None:
        """The forward of a step of decodes, from the feed's static memory to the static logits."""
        feed = self._batch.feed
        assert feed is not None
        rows = feed.decode_rows(bucket)
        attention = StepAttention.of(self._backend, RaggedBatch([], [], (), rows))
        positions = rows.positions.to(torch.int64)
        hidden = self._model.hidden_states(feed.decode_ids(bucket)[None], positions[None], attention)
        self._logits[:bucket].copy_(self._model.logits(hidden))

    def _launch_any(self, step: SchedulerOutput) -> _Launched:
        source_rows = step.sampled_rows + [fork.parent_row for fork in step.forks]
        rows, logits_index = np.unique(np.array(source_rows, dtype=np.int64), return_inverse=True)
        logits, pooled, prompt_logprobs = None, None, {}
        if step.slots:
            bucket = self._token_bucket(step.total_num_tokens)
            inputs = self._batch.build(step, bucket)
            attention = StepAttention.of(self._backend, inputs.ragged)
            if bucket is not None:
                hidden = self._run_in_pieces(attention, bucket, step.total_num_tokens)
            else:
                assert inputs.input_ids is not None and inputs.position_ids is not None
                hidden = self._model.hidden_states(inputs.input_ids, inputs.position_ids, attention)
            if copies := [block_copy for fork in step.forks for block_copy in fork.block_copies]:
                self._backend.copy_blocks(copies)
            if source_rows:
                is_all = rows.size == len(hidden)  # a step of decodes
                wanted = hidden if is_all else hidden[to_device(inputs.row_ends[rows] - 1, self._device)]
                logits = self._model.logits(wanted)
            prompt_logprobs = self._prompt_logprobs(step, inputs, hidden)
            pooled = self._pooler.pool(step, inputs.row_ends, hidden)
        return _Launched(
            step=step,
            slots=[step.slots[row] for row in step.sampled_rows] + [fork.row.slot for fork in step.forks],
            positions=np.array([step.start_positions[row] + step.num_tokens[row] for row in source_rows], dtype=np.int64),
            source_rows=source_rows,
            logits_index=logits_index,
            logits=logits,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
        )

    def _token_bucket(self, num_tokens: int) -> int | None:
        """Tokens that a step is padded to; None where it does not run from static memory."""
        if self._static is None or self._batch.feed is None:
            return None
        return next((size for size in self._token_buckets if size >= num_tokens), None)

    def _run_in_pieces(self, attention: StepAttention, bucket: int, num_tokens: int) -> torch.Tensor:
        """Final hidden states [num_tokens, E] of the tokens in the feed's static memory."""
        fused, feed, static = self._model.fused, self._batch.feed, self._static
        assert isinstance(fused, FusedDecoder) and feed is not None and static is not None
        input_ids, positions, token_slots = feed.tokens(bucket)
        fused.run(
            lambda: feed.resolve_ids(input_ids, token_slots),
            attention,
            replace(attention.rows, positions=positions, token_slots=token_slots),
            static.first(bucket),
            num_tokens,
            lambda piece, work: self._run(("piece", bucket, piece), work),
        )
        return static.hidden[:num_tokens]

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
                logits = self._model.logits(hidden[first + start : first + start + wanted.size]).float()
                parts.append(compute_logprobs(logits, to_device(wanted, self._device), num_best))
            result[row] = parts
        return result

    @torch.inference_mode()
    def sample(self, masks: HostMasks | None) -> PendingStep:
        """Draw the launched step's tokens. A mask of a row holds for its forks too. Raises OutOfDeviceMemory before any token
        is noted."""
        launched, self._launched = self._launched, None
        assert launched is not None, "no step was launched"
        with _out_of_memory_raised_as_ours(launched.step):
            return self._sample(launched, masks)

    def _sample(self, launched: _Launched, masks: HostMasks | None) -> PendingStep:
        token_ids, logprobs = None, None
        wanted: tuple[list[int], list[int]] = ([], [])
        if launched.logits is not None:
            mode = self._kernel_mode(launched, masks)
            if mode is not None:
                token_ids = self._sample_by_kernel(launched, launched.logits, mode)
            else:
                token_ids, logprobs, wanted = self._sample_in_general(launched, launched.logits, masks)
        copies = HostCopies(self._device, self._copy_stream)
        pending = PendingStep(
            step_id=launched.step.step_id,
            token_ids=None if token_ids is None else copies.copy(token_ids),
            logprobs_rows=wanted[0],
            num_logprobs=wanted[1],
            logprobs=None if logprobs is None else copies.copy_logprobs(logprobs),
            prompt_logprobs={
                row: [copies.copy_logprobs(part) for part in parts] for row, parts in launched.prompt_logprobs.items()
            },
            pooled_rows=launched.step.pooled_rows,
            pooled=None if launched.pooled is None else copies.copy(launched.pooled),
            copies=copies,
        )
        copies.record()
        return pending

    def _kernel_mode(self, launched: _Launched, masks: HostMasks | None) -> str | None:
        """The sampling kernel's mode for this step as it is; None where its logits are edited first, or more is asked for."""
        if self._batch.feed is None or masks is not None:
            return None
        return self._batch.sampling.kernel_mode(np.asarray(launched.slots, dtype=np.int64), launched.positions)

    def _sample_by_kernel(self, launched: _Launched, logits: torch.Tensor, mode: str) -> torch.Tensor:
        """From plain logits: those in static memory by a graph."""
        bucket = launched.bucket
        if bucket is None:
            return self._draw_rows(self._expanded(launched, logits), mode)
        self._wait_for_token_ids()
        self._run(("sample", bucket, mode), lambda: self._draw(self._logits[:bucket], bucket, mode))
        return self._drawn(len(launched.slots))

    def _draw_rows(self, logits: torch.Tensor, mode: str) -> torch.Tensor:
        self._wait_for_token_ids()
        self._draw(logits, len(logits), mode)
        return self._drawn(len(logits))

    def _wait_for_token_ids(self) -> None:
        """The step before may still be copying its tokens from the static memory that this one writes."""
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copy_stream)

    def _drawn(self, num_rows: int) -> torch.Tensor:
        token_ids = self._token_ids[:num_rows]
        return token_ids if self._copy_stream is not None else token_ids.clone()

    def _draw(self, logits: torch.Tensor, num_rows: int, mode: str) -> None:
        feed = self._batch.feed
        assert feed is not None
        sample_tokens(
            logits,
            feed.field("sample_slots", num_rows),
            feed.columns,
            self._token_ids[:num_rows],
            feed.last_token,
            workspace=self._sampling_workspace,
            mode=mode,
        )

    def _expanded(self, launched: _Launched, logits: torch.Tensor) -> torch.Tensor:
        """One row of logits a token to sample: a forked row's are there several times."""
        if np.array_equal(launched.logits_index, np.arange(len(logits))):
            return logits
        return logits[to_device(launched.logits_index, self._device)]

    def _sample_in_general(
        self, launched: _Launched, logits: torch.Tensor, masks: HostMasks | None
    ) -> tuple[torch.Tensor, LogprobsTensors | None, tuple[list[int], list[int]]]:
        """Tokens; logprobs of the rows that want them; those rows and how many best tokens each wants.

        torch edits the logits, and the sampling kernel draws from them where it knows all that is left to do.
        """
        logits = self._expanded(launched, logits).float()
        sampling, slots = self._batch.sampling, launched.slots
        batch = sampling.take(slots, launched.positions, launched.source_rows, masks)
        wants = np.flatnonzero(batch.num_logprobs >= 0)
        if not wants.size and self._batch.feed is not None and (mode := sampling.draw_mode(np.asarray(slots))) is not None:
            edit(logits, batch)
            token_ids = self._draw_rows(logits, mode)  # notes the tokens by itself, so nothing large may follow it
            sampling.add_tokens(slots, token_ids.clamp(min=0))
            return token_ids, None, ([], [])
        wants_rows = to_device(wants, self._device)
        raw = logits[wants_rows] if wants.size else None  # a copy: sampling overwrites logits
        token_ids = sample(logits, batch)
        num_best = batch.num_logprobs[wants]
        # A bad row's next step, which may be launched before the host knows of it, needs some token that there is.
        real_ids = token_ids.clamp(min=0)
        logprobs = None if raw is None else compute_logprobs(raw, real_ids[wants_rows], int(num_best.max()))
        self._batch.record(slots, real_ids)
        if self._batch.feed is not None:
            self._batch.feed.set_output_index(np.asarray(slots), batch.output_index + 1)
        return token_ids, logprobs, (wants.tolist(), num_best.tolist())

    @torch.inference_mode()
    def idle(self) -> bool:
        """Capture some missing graphs, for no longer than a pause may take; returns whether there are more. For moments without
        work: it runs nothing."""
        graphs, feed = self._graphs, self._batch.feed
        if graphs is None or feed is None:
            return False
        graphs.begin_step(idle=True)
        num_captured = len(graphs)
        for bucket in self._buckets:
            if ("decode", bucket) not in graphs:
                self._run_padding(bucket)
                return len(graphs) > num_captured
        if self._static is not None and isinstance(self._model.fused, FusedDecoder):
            last = len(self._model.fused.layers)
            for bucket in self._token_buckets:
                if ("piece", bucket, last) not in graphs:
                    self._run_padding_tokens(bucket)
                    return len(graphs) > num_captured
        return False

    def _run_padding(self, bucket: int) -> None:
        """A step of decodes and every form of sampling, on padding rows, which leave nothing behind."""
        assert self._batch.feed is not None
        self._batch.feed.send({}, padded_to=bucket)
        for mode in ("greedy", "random", "filtered"):
            self._run(("sample", bucket, mode), partial(self._draw, self._logits[:bucket], bucket, mode))
        self._run(("decode", bucket), lambda: self._decode(bucket))

    def _run_padding_tokens(self, bucket: int) -> None:
        """The pieces of a step with chunks, on padding tokens, which leave nothing behind."""
        feed = self._batch.feed
        assert feed is not None
        none = np.zeros(0, dtype=np.int32)
        feed.send({}, padded_to=1)
        feed.send_tokens(none, none, none, padded_to=bucket)
        # Attention gets one padding row: of length 0, as in a step of decodes.
        rows = feed.decode_rows(1)
        self._run_in_pieces(StepAttention.of(self._backend, RaggedBatch([], [], (), rows)), bucket, 1)

    def warm_up(self, num_tokens: int = 64) -> None:
        """Run every kind of step once, on the scratch page: what is compiled or set up at first use is ready then.

        num_tokens: of the prompts (at most the context less two).
        """
        for step in self._scratch_steps.of_every_kind(num_tokens, mixes=self._batch.feed is not None):
            self.launch(step)
            self.sample(None).wait()
        self._warm_up_buckets()

    @torch.inference_mode()
    def _warm_up_buckets(self) -> None:
        if self._batch.feed is None:
            return
        for bucket in self._buckets:
            self._run_padding(bucket)
        if self._static is not None:
            for bucket in self._token_buckets:
                self._run_padding_tokens(bucket)

    def profile(self, num_tokens: int) -> int:
        """Bytes that a step of num_tokens takes beside weights and pages, measured on the scratch page. GPU only."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        for step in self._scratch_steps.large(num_tokens):
            self.launch(step)
            self.sample(None).wait()
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return int(peak - before)


@contextmanager
def _out_of_memory_raised_as_ours(step: SchedulerOutput) -> Iterator[None]:
    """Out of memory is the step's fate, not the engine's: raised as OutOfDeviceMemory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory(f"a step of {step.total_num_tokens} tokens does not fit: {error}") from error


def _is_decodes_alone(step: SchedulerOutput) -> bool:
    """Whether every row has one token, is sampled, and wants nothing else."""
    return (
        bool(step.slots)
        and step.total_num_tokens == len(step.slots)
        and len(step.sampled_rows) == len(step.slots)
        and not step.forks
        and not step.prompt_logprobs_rows
        and not step.pooled_rows
    )
