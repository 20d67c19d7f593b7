"""Scheduler: which tokens of which requests the next step computes.

There is no prefill phase and no decode phase (iteration-level scheduling after Orca, OSDI '22): every request has
`num_computed_tokens` catching up with its tokens, and each step spends one token budget over all of them. Decodes are
served first, then prompts in order of arrival, in chunks of what is left. When pages run out, the youngest request gives
its own back and computes them again later. Requests of lower `priority` (a smaller number goes first) leave the queue before
others, and give up their pages after them; the number falls while they wait (see `waiting_queue`).

A request that is `alone`, because engines have died in its steps, gets a step of its own: nothing else is in flight with it, so
that nothing else is blamed if that kills this one too. Once such a step has completed it joins the others.

With a pipeline depth of 1 a step is planned while the one before runs: its tokens are counted but not yet known.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

from engine.deadlines import FIRST_TOKEN, WHOLE, Deadlines, deadline_exceeded
from engine.errors import OctavoError, RequestFailed
from engine.kv_cache_manager import KVCacheManager, PrefixHit
from engine.messages import EngineStats, ErrorInfo, RequestOutput, TokenLogprobs
from engine.request import FinishReason, Request, RequestStatus, TokenMatcher
from engine.request_output import make_output
from engine.step import Fork, ModelRunnerOutput, NewRow, SchedulerOutput
from engine.step_budget import StepBudget
from engine.waiting_queue import WaitingQueue, rank

# Found once: looking a member up in its class for every token of every step is a large part of what a step costs.
_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED


class _InFlightStep:
    """A planned step and the requests of its rows. sampled, then forked, are in the order of the runner's tokens; chunk_rows:
    the rows that sample nothing. is_alone: its one request is `alone`."""

    __slots__ = ("chunk_rows", "forked", "is_alone", "rows", "sampled", "step")

    def __init__(self, step: SchedulerOutput) -> None:
        self.step = step
        self.is_alone = False
        self.rows: list[Request] = []
        self.chunk_rows: list[int] = []
        self.sampled: list[Request] = []
        self.forked: list[Request] = []


class Scheduler:
    """Owns the queue, the running list and every token list. Not thread-safe: one engine loop calls it.

    max_model_len: served context, a bound on each request's tokens. max_num_seqs slots, max_num_batched_tokens a step,
    max_num_mixed_tokens (None: as many) a step that holds many decodes; see `StepBudget`.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_num_mixed_tokens: int | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self._budget = StepBudget(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_mixed_tokens=max_num_mixed_tokens,
            block_size=kv_cache.block_size,
        )
        self._waiting = WaitingQueue()
        self._running: list[Request] = []  # in order of admission: the last one is preempted first
        self._by_id: dict[str, list[Request]] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []
        self._in_flight: deque[_InFlightStep] = deque()
        self._num_steps = 0
        self._num_matchers = 0  # of unfinished requests
        self._deadlines = Deadlines()
        self._alone_is_due = False  # the next step to be planned is one of its own for the head of the queue
        # After a step did not fit in the device's memory: whether the next may admit, and the requests that gave up their
        # place for it and have had no token since.
        self._admits = True
        self._did_not_fit: set[Request] = set()
        self._num_prefix_waits = 0  # at the last admission: for a prefix that another request was computing
        self._counts = dict.fromkeys(
            (
                "computed_tokens",
                "prompt_tokens",
                "cached_prompt_tokens",
                "prefix_query_tokens",
                "generation_tokens",
                "preemptions",
                "recomputed_tokens",
            ),
            0,
        )

    # -- in and out of the queue ------------------------------------------------------------------------------------

    def add(self, choices: list[Request]) -> None:
        """Queue the choices of one request. The first computes the prompt, and the others fork from it; choices that bring
        output from an earlier engine each go their own way."""
        now = time.monotonic()
        for request in choices:
            assert request.max_total_tokens <= self.max_model_len, "the core refuses longer ones"
            request.arrival_time_s = now
            request.rank = rank(now, request.priority)
            self._num_matchers += request.matcher is not None
        self._by_id[choices[0].request_id] = list(choices)
        self._note_deadlines(choices)
        head, rest = choices[0], choices[1:]
        fresh = not any(request.num_output_tokens for request in choices) and head.sampling.max_tokens > 0
        if fresh:
            for request in rest:
                request.status = RequestStatus.PENDING_FORK
            head.pending_forks = rest
            self._waiting.add(head)
        else:
            for request in choices:
                self._waiting.add(request)

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        """End choices without output; what they hold is free at once. Unknown ids have finished already."""
        for request in list(self._by_id.get(request_id, ())):
            if choice_index is None or request.choice_index == choice_index:
                self._release_forks(request)
                self._finish(request)

    def _note_deadlines(self, choices: list[Request]) -> None:
        first = choices[0]
        if first.deadline_s is not None:
            self._deadlines.add(first.request_id, WHOLE, first.deadline_s)
        if first.first_token_deadline_s is not None and not _has_output(choices):
            self._deadlines.add(first.request_id, FIRST_TOKEN, first.first_token_deadline_s)
        self._deadlines.forget_ended(self._by_id, len(self._by_id))

    def expire(self) -> list[RequestOutput]:
        """End the requests whose time is up, waiting or running; to be called before every step."""
        outputs = []
        for request_id, kind in self._deadlines.take_passed():
            choices = self._by_id.get(request_id)
            if choices is None or (kind == FIRST_TOKEN and _has_output(choices)):
                continue
            num_tokens = sum(choice.num_output_tokens for choice in choices)
            since = f"{time.monotonic() - choices[0].arrival_time_s:.1f} s in the engine, {num_tokens} tokens"
            outputs.append(self.fail(choices[0], deadline_exceeded(kind, since)))
        return outputs

    @property
    def has_unfinished(self) -> bool:
        return bool(self._by_id)

    # -- plan a step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when nothing can be computed now (idle, or waiting for steps in flight)."""
        if self._in_flight and (self._alone_is_due or self._in_flight[-1].is_alone):
            return None
        flight = _InFlightStep(SchedulerOutput(step_id=self._num_steps))
        if self._alone_is_due and self._admits:
            self._alone_is_due = False
            self._admit_waiting(flight, self._budget.prompt_tokens(0))
        if not flight.rows:
            self._plan(flight)
        step = flight.step
        if not step.slots:
            return None
        step.freed_slots, self._freed_slots = self._freed_slots, []
        step.zeroed_blocks = self.kv_cache.take_to_zero()
        self._num_steps += 1
        self._in_flight.append(flight)
        return step

    def _plan(self, flight: _InFlightStep) -> None:
        """Decodes, then prompts that are begun, then those that wait."""
        num_preemptions = self._counts["preemptions"]
        prefills = self._plan_decodes(flight)
        budget = self._budget.prompt_tokens(len(flight.rows), self._oldest_wait_s(prefills))
        for request in prefills:
            budget -= self._plan_chunk(flight, request, budget)
        if self._admits and self._counts["preemptions"] == num_preemptions:
            self._admit_waiting(flight, budget)
        self._admits = True

    def matchers(self) -> dict[int, TokenMatcher]:
        """Of the step planned last: by row, what restricts the token to be sampled there. A row's forks start as it does."""
        if not self._num_matchers:
            return {}
        flight = self._in_flight[-1]
        sampled = zip(flight.step.sampled_rows, flight.sampled, strict=True)
        return {row: r.matcher for row, r in sampled if r.matcher is not None and r.status is not _FINISHED}

    def step_request_ids(self) -> list[str]:
        """Of the step planned last: the ids of its requests, a row each."""
        return [request.request_id for request in self._in_flight[-1].rows]

    def fail_row(self, row: int, error: OctavoError) -> RequestOutput:
        """End the request of a row of the step planned last with an error."""
        return self.fail(self._in_flight[-1].rows[row], error)

    def _oldest_wait_s(self, prefills: list[Request]) -> float:
        """How long the prompt that came first has been waiting, of those being computed and the next in the queue."""
        prompts = [request for request in (*prefills, *itertools.islice(self._waiting, 1)) if request.num_output_tokens == 0]
        return time.monotonic() - min(request.arrival_time_s for request in prompts) if prompts else 0.0

    def _plan_decodes(self, flight: _InFlightStep) -> list[Request]:
        """A row for each running request whose only missing token is its last output; returns those that lack more.

        This and `_take_token` are all that a request costs in most steps, once a token: no pages, no hashes, no calls.
        """
        rows, slots, start_positions = flight.rows, flight.step.slots, flight.step.start_positions
        prefills = []
        for request in self._running.copy():
            position = request.num_computed_tokens
            if position >= request.num_tokens_to_compute or request.status is not _RUNNING:
                continue  # steps in flight bring its last token; or it was preempted for a row before it
            if position < request.num_prompt_tokens or position + 1 < request.num_tokens_ahead:
                prefills.append(request)
                continue
            if position >= request.page_capacity and not self._extend(flight, request, position + 1):
                continue
            rows.append(request)
            slots.append(request.slot)
            start_positions.append(position)
            request.num_computed_tokens = position + 1
            request.num_tokens_ahead += 1
            request.num_inflight_steps += 1
        flight.sampled = rows.copy()
        flight.step.num_tokens = [1] * len(rows)
        flight.step.sampled_rows = list(range(len(rows)))
        self._counts["computed_tokens"] += len(rows)
        return prefills

    def _plan_chunk(self, flight: _InFlightStep, request: Request, budget: int) -> int:
        """A row for a running request that lacks many tokens; returns what of the budget is spent."""
        if budget == 0 or request.status is not _RUNNING:
            return 0
        start = request.num_computed_tokens
        num_new, spent = self._budget.cut(start, request.num_tokens_ahead - start, budget)
        if not self._extend(flight, request, start + num_new):
            return 0
        self._add_row(flight, request, num_new)
        return spent

    def _extend(self, flight: _InFlightStep, request: Request, num_tokens: int) -> bool:
        """Give a running request pages for num_tokens in all, preempting younger ones if need be. False: no row for it now."""
        while (new_blocks := self.kv_cache.allocate(request, num_tokens)) is None:
            victim = self._youngest_not_in(flight)
            if victim is None:
                return False  # the rows already planned make progress, and this one gets its turn
            self._preempt(victim)
            if victim is request:
                return False
        if new_blocks:
            flight.step.new_blocks.append((request.slot, new_blocks))
        return True

    def _youngest_not_in(self, flight: _InFlightStep) -> Request | None:
        """The running request without a row in this step that would be the last in the queue."""
        planned = {*flight.rows, *flight.forked}
        return max((r for r in reversed(self._running) if r not in planned), key=lambda r: r.rank, default=None)

    def _admit_waiting(self, flight: _InFlightStep, budget: int) -> None:
        """Start waiting requests in the order of the queue. One whose prefix is being computed by another waits, and does not
        hold up those behind it; one for which there are no pages does."""
        skipped: list[Request] = []
        self._num_prefix_waits = 0
        while self._waiting and budget > 0 and self._free_slots:
            request = self._waiting.pop()
            hit = self.kv_cache.find_prefix(request)
            if hit is None:
                skipped.append(request)
                self._num_prefix_waits += 1
                continue
            # Each running request may soon want another page; starting one more is no use if that preempts it again.
            if not self.kv_cache.can_admit(request, hit, reserve_blocks=len(self._running)):
                skipped.append(request)
                break
            if request.alone and (flight.rows or self._in_flight):
                self._alone_is_due = True
                skipped.append(request)
                break
            num_new, spent = self._budget.cut(hit.num_tokens, request.num_tokens - hit.num_tokens, budget)
            self._admit(flight, request, hit, num_new)
            budget -= spent
            if request.alone:
                flight.is_alone = True
                break
        self._waiting.add_first(skipped)

    def _admit(self, flight: _InFlightStep, request: Request, hit: PrefixHit, num_new: int) -> None:
        self.kv_cache.admit(request, hit)
        allocated = self.kv_cache.allocate(request, hit.num_tokens + num_new)
        assert allocated is not None, "can_admit promised these pages"
        request.num_computed_tokens = hit.num_tokens
        first_time = request.first_scheduled_time_s is None
        if first_time:
            request.first_scheduled_time_s = time.monotonic()
            request.num_cached_tokens = min(hit.num_tokens, request.num_prompt_tokens)
        if first_time and not request.num_output_tokens:
            self._counts["prompt_tokens"] += request.num_prompt_tokens
            self._counts["cached_prompt_tokens"] += request.num_cached_tokens
            self._counts["prefix_query_tokens"] += request.num_prompt_tokens * self.kv_cache.reads_prefix(request)
        else:  # preempted, or begun by an engine that died
            self._counts["recomputed_tokens"] += request.num_tokens - hit.num_tokens
        self._start(request)
        flight.step.new_rows.append(self._new_row(request))
        self._add_row(flight, request, num_new)

    def _start(self, request: Request) -> None:
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        self._running.append(request)

    def _new_row(self, request: Request) -> NewRow:
        return NewRow(
            slot=request.slot,
            token_ids=np.asarray(request.token_ids, dtype=np.int32),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=request.num_computed_tokens,
            sampling=request.sampling,
            seed=request.seed,
            block_ids=self.kv_cache.table(request),
            stop_token_ids=tuple(request.stop_token_ids),
            pooling=request.pooling,
        )

    def _add_row(self, flight: _InFlightStep, request: Request, num_new: int) -> None:
        step = flight.step
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
        self._counts["computed_tokens"] += num_new
        flight.rows.append(request)
        if request.num_computed_tokens == request.num_tokens_ahead and request.sampling.max_tokens > 0:
            step.sampled_rows.append(row)
            flight.sampled.append(request)
            request.num_tokens_ahead += 1
            if request.pending_forks:
                self._fork(flight, request, row)
        else:
            flight.chunk_rows.append(row)

    def _fork(self, flight: _InFlightStep, parent: Request, row: int) -> None:
        """The prompt is done: its further choices start from the same logits, as far as slots and pages reach. The rest
        queue up at the front and find the full pages of the prompt in the cache."""
        children, parent.pending_forks = parent.pending_forks, []
        for i, child in enumerate(children):
            copies = self.kv_cache.fork(parent, child) if self._free_slots else None
            if copies is None:
                self._waiting.add_first(children[i:])
                break
            child.num_computed_tokens = child.num_prompt_tokens
            child.num_cached_tokens = parent.num_cached_tokens
            child.first_scheduled_time_s = parent.first_scheduled_time_s
            self._start(child)
            flight.step.forks.append(Fork(row, self._new_row(child), copies))
            flight.forked.append(child)
            child.num_inflight_steps += 1
            child.num_tokens_ahead += 1

    def _preempt(self, request: Request) -> None:
        """Take a request's pages and slot. It queues again once the steps in flight have told its tokens."""
        self._counts["preemptions"] += 1
        request.num_preemptions += 1
        self._leave_slot(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        request.pooled = None
        if request.num_inflight_steps == 0:
            self._waiting.add_first([request])

    def _leave_slot(self, request: Request) -> None:
        self.kv_cache.free(request)
        self._running.remove(request)
        self._free_slots.append(request.slot)
        self._freed_slots.append(request.slot)
        request.slot = -1

    # -- a step that did not fit -----------------------------------------------------------------------------------

    def roll_back(self) -> list[RequestOutput]:
        """Take back the step that `schedule` returned last, because the device has no memory for it.

        Its youngest prompt (or youngest decode) gives up its place, the next step admits nothing, and steps are half as large
        until they have grown back. A request to which this happens again before it has a token, and not for another prompt in
        its step, ends with an error.
        """
        flight = self._in_flight.pop()
        self.kv_cache.zero_again(flight.step.zeroed_blocks)
        self._undo(flight)
        num_tokens = flight.step.total_num_tokens
        self._budget.shrink(num_tokens)
        self._admits = False
        prompts = {r for r, count in zip(flight.rows, flight.step.num_tokens, strict=True) if count > 1}
        candidates = prompts or set(flight.rows)
        victim = next((request for request in reversed(self._running) if request in candidates), None)
        if victim is None:
            return []  # they ended with the step before, whose result was taken between this one's launch and its sampling
        if victim in self._did_not_fit and len(prompts) <= 1:
            sentence = (
                f"the device ran out of memory twice in a row with this request ({victim.num_tokens} tokens, in a step of "
                f"{num_tokens}); the server takes larger ones with a lower gpu_memory_utilization"
            )
            return [self.fail(victim, RequestFailed(sentence))]
        self._did_not_fit.add(victim)
        self._preempt(victim)
        return []

    def _undo(self, flight: _InFlightStep) -> None:
        """Everything as before the step, but that its new rows have their slots and pages already."""
        step = flight.step
        for fork, child in zip(step.forks, flight.forked, strict=True):
            child.num_inflight_steps -= 1
            child.num_tokens_ahead -= 1
            self._leave_slot(child)
            child.num_computed_tokens = 0
            child.status = RequestStatus.PENDING_FORK
            flight.rows[fork.parent_row].pending_forks.append(child)
        for request, start in zip(flight.rows, step.start_positions, strict=True):
            request.num_computed_tokens = start
            request.num_inflight_steps -= 1
        for request in flight.sampled:
            request.num_tokens_ahead -= 1
        self._counts["computed_tokens"] -= step.total_num_tokens

    def fail(self, request: Request, error: OctavoError) -> RequestOutput:
        """End a request, all its choices, with an error."""
        self.abort(request.request_id)
        return RequestOutput(
            request_id=request.request_id,
            choice_index=request.choice_index,
            first_token_index=request.num_output_tokens,
            finish_reason="error",
            error=ErrorInfo.of(error),
        )

    def _fail_for_bad_numbers(self, request: Request) -> RequestOutput:
        """End a request whose numbers went bad, all its choices; whatever they computed is of no use to anybody."""
        for choice in self._by_id[request.request_id]:
            self.kv_cache.taint(choice)
        place = "its prompt" if request.num_output_tokens == 0 else f"output token {request.num_output_tokens}"
        allowed = "" if request.matcher is None else " for any token that is allowed there"
        sentence = f"the model gave no usable numbers (NaN or infinity) after {place}{allowed}; only this request is ended"
        return self.fail(request, RequestFailed(sentence, code="bad_numbers"))

    # -- take a step's result ---------------------------------------------------------------------------------------

    def update(self, result: ModelRunnerOutput) -> list[RequestOutput]:
        """Append the oldest step's tokens, end what is finished and return what there is to tell."""
        flight = self._in_flight.popleft()
        assert result.step_id == flight.step.step_id, "results come in the order of the steps"
        if flight.is_alone:
            for choice in self._by_id.get(flight.rows[0].request_id, ()):
                choice.alone = False
        for row, entries in result.prompt_logprobs.items():
            if flight.rows[row].status is _RUNNING:
                flight.rows[row].prompt_logprobs.extend(entries)
        for row, vector in result.pooled.items():
            request = flight.rows[row]
            if request.status is _RUNNING:
                request.pooled = vector if request.pooled is None else request.pooled + vector
        outputs = [
            self._fail_for_bad_numbers(flight.rows[row])
            for row in dict.fromkeys(result.bad_rows)
            if flight.rows[row].status is _RUNNING
        ]
        outputs += self._take_chunks(flight)
        sampled, num_silent = flight.sampled + flight.forked, len(outputs)
        for request, token_id, logprobs in zip(sampled, result.token_ids, result.logprobs, strict=True):
            request.num_inflight_steps -= 1
            if request.status is not _FINISHED:  # else it ended or was aborted while this step was in flight
                outputs.append(self._take_token(request, token_id, logprobs))
        self._counts["generation_tokens"] += len(outputs) - num_silent
        self._budget.grow()
        if self._did_not_fit:
            self._did_not_fit.difference_update(sampled)
        return outputs

    def _take_chunks(self, flight: _InFlightStep) -> list[RequestOutput]:
        """Rows that sample nothing: their pages are known now, and a request that asks for no output may be done."""
        outputs = []
        for row in flight.chunk_rows:
            request = flight.rows[row]
            request.num_inflight_steps -= 1
            if request.status is _RUNNING:
                self.kv_cache.mark_computed(request, flight.step.start_positions[row] + flight.step.num_tokens[row])
                if request.num_computed_tokens == request.max_total_tokens and request.num_inflight_steps == 0:
                    outputs.append(make_output(request, [], None, FinishReason.LENGTH))
                    self._finish(request)
            self._requeue_if_preempted(request)
        return outputs

    def _requeue_if_preempted(self, request: Request) -> None:
        if request.status is RequestStatus.PREEMPTED and request.num_inflight_steps == 0:
            self._waiting.add_first([request])

    def _take_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Append a token, end the request if it is its last, and return what there is to tell."""
        if token_id < 0:
            return self._fail_for_bad_numbers(request)
        request.token_ids.append(token_id)
        num_tokens = len(request.token_ids)
        if request.status is not _RUNNING:
            self._requeue_if_preempted(request)
        elif num_tokens > request.next_mark:
            self.kv_cache.mark_computed(request, num_tokens - 1)  # the new token itself is not in a page yet
        output_index = num_tokens - 1 - request.num_prompt_tokens
        may_end = num_tokens >= request.max_total_tokens or token_id in request.stop_token_ids or request.matcher is not None
        if output_index and not may_end and logprobs is None:
            return RequestOutput(
                request_id=request.request_id,
                choice_index=request.choice_index,
                first_token_index=output_index,
                token_ids=[token_id],
                num_preemptions=request.num_preemptions,
            )
        stops = token_id in request.stop_token_ids and request.num_output_tokens > request.sampling.min_tokens
        try:
            reason = FinishReason.STOP if stops else self._finish_reason(request, token_id)
        except RequestFailed as error:
            return self.fail(request, error)
        output = make_output(request, [token_id], logprobs, reason, stop_token_id=token_id if stops else None)
        if reason is not None:
            self._finish(request)
        return output

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        """Whether a choice ends after a token that is no stop token. Raises RequestFailed where its matcher cannot go on."""
        if request.matcher is not None and request.matcher.accept(token_id):
            return FinishReason.STOP
        return FinishReason.LENGTH if request.num_tokens >= request.max_total_tokens else None

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave_slot(request)
        elif request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        request.status = RequestStatus.FINISHED
        self._num_matchers -= request.matcher is not None
        self._did_not_fit.discard(request)
        siblings = self._by_id[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self._by_id[request.request_id]

    def _release_forks(self, request: Request) -> None:
        """The request that computes the prompt goes away: the next choice does it instead."""
        for sibling in self._by_id[request.request_id]:
            if request in sibling.pending_forks:
                sibling.pending_forks.remove(request)
        if request.pending_forks:
            heir, *rest = request.pending_forks
            heir.pending_forks, request.pending_forks = rest, []
            self._waiting.add_first([heir])

    # -- what others may know ---------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Gauges and counters of now; the core adds its steps' histograms."""
        num_waiting = sum(len(choices) for choices in self._by_id.values()) - len(self._running)
        num_queued = len(self._waiting)  # the others wait for their sibling's prompt, or for a step in flight
        gauges = EngineStats(
            num_running=len(self._running),
            num_waiting=num_waiting,
            num_deferred=num_waiting - num_queued + min(self._num_prefix_waits, num_queued),
            num_blocks=self.kv_cache.num_blocks,
            num_referenced_blocks=self.kv_cache.num_referenced_blocks,
            num_cached_blocks=self.kv_cache.num_cached_blocks,
            steps=self._num_steps,
        )
        return msgspec.structs.replace(gauges, **self._counts)

    def unfinished(self) -> Iterator[Request]:
        """Every choice that has not ended, queued or running."""
        for choices in self._by_id.values():
            yield from choices

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, statuses and pages agree."""
        self.kv_cache.check_integrity()
        slots = [request.slot for request in self._running]
        assert sorted(slots + self._free_slots) == list(range(self.max_num_seqs)), "a slot is lost or taken twice"
        assert all(request.status is RequestStatus.RUNNING for request in self._running)
        assert all(request.status is RequestStatus.WAITING for request in self._waiting)
        assert sorted(self._waiting, key=lambda request: request.rank) == list(self._waiting), "the queue is out of order"
        assert all(request.num_computed_tokens <= request.num_tokens_ahead for request in self.unfinished())
        assert all(request.num_computed_tokens <= request.page_capacity for request in self._running), "a position has no page"


def _has_output(choices: list[Request]) -> bool:
    """Whether a request, of which these choices have not ended, has had its first token."""
    return len(choices) < choices[0].sampling.n or any(choice.num_output_tokens for choice in choices)
