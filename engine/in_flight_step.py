"""A step on its way: the plan that the device gets, and whose its rows are. What adding a row counts, `take_back` uncounts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.request import Request, RequestStatus, TokenMatcher
from engine.step import Fork, ModelRunnerOutput, NewRow, SchedulerOutput


class InFlightStep:
    """A planned step and the requests of its rows. sampled, then forked, are in the order of the runner's tokens; chunk_rows:
    the rows that sample nothing. is_alone: its one request is `alone`.

    A row of a request that decodes is added by the scheduler's own loop, which has no time for a call.
    """

    __slots__ = ("chunk_rows", "forked", "is_alone", "rows", "sampled", "step")

    def __init__(self, step: SchedulerOutput) -> None:
        self.step = step
        self.is_alone = False
        self.rows: list[Request] = []
        self.chunk_rows: list[int] = []
        self.sampled: list[Request] = []
        self.forked: list[Request] = []

    def fill_slot(self, request: Request, block_ids: tuple[list[int], ...]) -> None:
        """Tell the device all of a request that has got a slot; a row of it is to follow."""
        self.step.new_rows.append(_new_row(request, block_ids))

    def add_row(self, request: Request, num_new: int) -> int | None:
        """Compute the next num_new tokens of a request. Returns the row, where it samples a token: all known ones are then
        computed."""
        step = self.step
        row = len(step.slots)
        step.slots.append(request.slot)
        step.start_positions.append(request.num_computed_tokens)
        step.num_tokens.append(num_new)
        if request.wants_prompt_logprobs and request.num_computed_tokens < request.num_prompt_tokens - 1:
            step.prompt_logprobs_rows.append(row)
        request.num_computed_tokens += num_new
        if request.pooling == "mean" or (request.pooling and request.num_computed_tokens == request.num_prompt_tokens):
            step.pooled_rows.append(row)
        request.num_inflight_steps += 1
        self.rows.append(request)
        if request.num_computed_tokens != request.num_tokens_ahead or request.sampling.max_tokens == 0:
            self.chunk_rows.append(row)
            return None
        step.sampled_rows.append(row)
        self.sampled.append(request)
        request.num_tokens_ahead += 1
        return row

    def add_fork(
        self, parent_row: int, child: Request, block_ids: tuple[list[int], ...], block_copies: list[tuple[int, int, int]]
    ) -> None:
        """Sample a first token for a further choice, which has got a slot, from the logits of a row."""
        self.step.forks.append(Fork(parent_row, _new_row(child, block_ids), block_copies))
        self.forked.append(child)
        child.num_inflight_steps += 1
        child.num_tokens_ahead += 1

    def youngest_without_row(self, running: Sequence[Request]) -> Request | None:
        """Of the running requests, those without a row in this step, the one that would be the last in the queue."""
        planned = {*self.rows, *self.forked}
        return max((r for r in reversed(running) if r not in planned), key=lambda r: r.rank, default=None)

    def matchers(self) -> dict[int, TokenMatcher]:
        """By row, what restricts the token to be sampled there. A row's forks start as it does."""
        sampled = zip(self.step.sampled_rows, self.sampled, strict=True)
        return {row: r.matcher for row, r in sampled if r.matcher is not None and r.status is not RequestStatus.FINISHED}

    def take_back(self) -> None:
        """The step did not run: everything as before it, but that its new rows keep their slots and pages. Forks, which the
        caller has taken out of theirs, wait for their parents again, unless they have ended."""
        for fork, child in zip(self.step.forks, self.forked, strict=True):
            child.num_inflight_steps -= 1
            child.num_tokens_ahead -= 1
            child.num_computed_tokens = 0
            if child.status is not RequestStatus.FINISHED:
                child.status = RequestStatus.PENDING_FORK
                self.rows[fork.parent_row].pending_forks.append(child)
        for request, start in zip(self.rows, self.step.start_positions, strict=True):
            request.num_computed_tokens = start
            request.num_inflight_steps -= 1
        for request in self.sampled:
            request.num_tokens_ahead -= 1

    def take_prompt_values(self, result: ModelRunnerOutput) -> None:
        """Keep what the step brought of prompt positions: logprobs, and sums of vectors for an embedding."""
        for row, entries in result.prompt_logprobs.items():
            if self.rows[row].status is RequestStatus.RUNNING:
                self.rows[row].prompt_logprobs.extend(entries)
        for row, vector in result.pooled.items():
            request = self.rows[row]
            if request.status is RequestStatus.RUNNING:
                request.pooled = vector if request.pooled is None else request.pooled + vector


def _new_row(request: Request, block_ids: tuple[list[int], ...]) -> NewRow:
    return NewRow(
        slot=request.slot,
        token_ids=np.asarray(request.token_ids, dtype=np.int32),
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=request.num_computed_tokens,
        sampling=request.sampling,
        seed=request.seed,
        block_ids=block_ids,
        stop_token_ids=tuple(request.stop_token_ids),
        pooling=request.pooling,
    )
