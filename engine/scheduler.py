"""Scheduler: which tokens of which requests the next step computes.

There is no prefill phase and no decode phase (iteration-level scheduling after Orca, OSDI '22): every request has
`num_computed_tokens` catching up with its tokens, and each step spends one token budget over all of them. Decodes are
served first, then prompts in order of arrival, in chunks of what is left. When pages run out, the youngest request gives
its own back and computes them again later. Requests of lower `priority` (a smaller number goes first) leave the queue before
others, and give up their pages after them; the number falls while they wait (see `waiting_queue`).

A request that is `alone`, because engines have died in its steps, gets a step of its own: nothing else is in flight with it, so
that nothing else is blamed if that kills this one too. Once such a step has completed it joins the others.

With a pipeline depth of 1 a step is planned while the one before runs: its tokens are counted but not yet known.

In files of their own: the queue (`waiting_queue`), a request's choices (`siblings`), a step's size (`step_budget`) and its rows
(`in_flight_step`), who gives way when it does not fit in the device's memory (`step_too_large`), `deadlines`, and what is told
of a choice (`request_output`).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator

import msgspec

from engine.deadlines import Deadlines
from engine.errors import OctavoError, RequestFailed
from engine.in_flight_step import InFlightStep
from engine.kv_cache_manager import KVCacheManager, PrefixHit
from engine.messages import EngineStats, RequestOutput, TokenLogprobs
from engine.request import FinishReason, Request, RequestStatus, TokenMatcher
from engine.request_output import bad_numbers, make_failure, make_output
from engine.siblings import Siblings
from engine.step import ModelRunnerOutput, SchedulerOutput
from engine.step_budget import StepBudget
from engine.step_too_large import GaveWay
from engine.waiting_queue import WaitingQueue, rank

# Found once: looking a member up in its class for every token of every step is a large part of what a step costs.
_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED


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
        self._siblings = Siblings()
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []
        self._in_flight: deque[InFlightStep] = deque()
        self._num_steps = 0
        self._deadlines = Deadlines()
        self._alone_is_due = False  # the next step to be planned is one of its own for the head of the queue
        self._admits = True  # whether the next step may begin prompts: not after one that did not fit
        self._gave_way = GaveWay()
        self._num_prefix_waits = 0  # at the last admission: for a prefix that another request was computing
        self._counts: defaultdict[str, int] = defaultdict(int)  # by the names of EngineStats

    # -- in and out of the queue ------------------------------------------------------------------------------------

    def add(self, choices: list[Request]) -> None:
        """Queue the choices of one request."""
        now = time.monotonic()
        for request in choices:
            assert request.max_total_tokens <= self.max_model_len, "the core refuses longer ones"
            request.arrival_time_s = now
            request.rank = rank(now, request.priority)
        for request in self._siblings.add(choices):
            self._waiting.add(request)
        self._deadlines.add_request(choices, self._siblings.by_id)

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        """End choices without output; what they hold is free at once. Unknown ids have finished already."""
        for request in self._siblings.of(request_id):
            if choice_index is None or request.choice_index == choice_index:
                if heir := self._siblings.hand_prompt_on(request):
                    self._waiting.add_first([heir])
                self._finish(request)

    def fail(self, request: Request, error: OctavoError) -> RequestOutput:
        """End a request, all its choices, with an error."""
        self.abort(request.request_id)
        return make_failure(request, error)

    def _fail_for_bad_numbers(self, request: Request) -> RequestOutput:
        """End a request whose numbers went bad, all its choices; whatever they computed is of no use to anybody."""
        for choice in self._siblings.of(request.request_id):
            self.kv_cache.taint(choice)
        return self.fail(request, bad_numbers(request))

    def expire(self) -> list[RequestOutput]:
        """End the requests whose time is up, waiting or running; to be called before every step."""
        return [self.fail(request, error) for request, error in self._deadlines.take_overdue(self._siblings.by_id)]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._siblings.by_id)

    # -- plan a step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """The next step, or None when nothing can be computed now (idle, or waiting for steps in flight)."""
        if self._in_flight and (self._alone_is_due or self._in_flight[-1].is_alone):
            return None
        flight = InFlightStep(SchedulerOutput(step_id=self._num_steps))
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

    def _plan(self, flight: InFlightStep) -> None:
        """Decodes, then prompts that are begun, then those that wait."""
        num_preemptions = self._counts["preemptions"]
        prefills = self._plan_decodes(flight)
        budget = self._budget.prompt_tokens(len(flight.rows), self._waiting.oldest_wait_s(prefills))
        for request in prefills:
            budget -= self._plan_chunk(flight, request, budget)
        if self._admits and self._counts["preemptions"] == num_preemptions:
            self._admit_waiting(flight, budget)
        self._admits = True

    def matchers(self) -> dict[int, TokenMatcher]:
        """Of the step planned last: by row, what restricts the token to be sampled there. A row's forks start as it does."""
        return self._in_flight[-1].matchers() if self._siblings.num_matchers else {}

    def step_request_ids(self) -> list[str]:
        """Of the step planned last: the ids of its requests, a row each."""
        return [request.request_id for request in self._in_flight[-1].rows]

    def fail_row(self, row: int, error: OctavoError) -> RequestOutput:
        """End the request of a row of the step planned last with an error."""
        return self.fail(self._in_flight[-1].rows[row], error)

    def _plan_decodes(self, flight: InFlightStep) -> list[Request]:
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

    def _plan_chunk(self, flight: InFlightStep, request: Request, budget: int) -> int:
        """A row for a running request that lacks many tokens; returns what of the budget is spent."""
        if budget == 0 or request.status is not _RUNNING:
            return 0
        start = request.num_computed_tokens
        num_new, spent = self._budget.cut(start, request.num_tokens_ahead - start, budget)
        if not self._extend(flight, request, start + num_new):
            return 0
        self._add_row(flight, request, num_new)
        return spent

    def _extend(self, flight: InFlightStep, request: Request, num_tokens: int) -> bool:
        """Give a running request pages for num_tokens in all, preempting younger ones if need be. False: no row for it now."""
        while (new_blocks := self.kv_cache.allocate(request, num_tokens)) is None:
            victim = flight.youngest_without_row(self._running)
            if victim is None:
                return False  # the rows already planned make progress, and this one gets its turn
            self._preempt(victim)
            if victim is request:
                return False
        if new_blocks:
            flight.step.new_blocks.append((request.slot, new_blocks))
        return True

    def _admit_waiting(self, flight: InFlightStep, budget: int) -> None:
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

    def _admit(self, flight: InFlightStep, request: Request, hit: PrefixHit, num_new: int) -> None:
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
        flight.fill_slot(request, self.kv_cache.table(request))
        self._add_row(flight, request, num_new)

    def _start(self, request: Request) -> None:
        request.slot = self._free_slots.pop()
        request.status = RequestStatus.RUNNING
        self._running.append(request)

    def _add_row(self, flight: InFlightStep, request: Request, num_new: int) -> None:
        self._counts["computed_tokens"] += num_new
        row = flight.add_row(request, num_new)
        if row is not None and request.pending_forks:
            self._fork(flight, request, row)

    def _fork(self, flight: InFlightStep, parent: Request, row: int) -> None:
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
            flight.add_fork(row, child, self.kv_cache.table(child), copies)

    def _preempt(self, request: Request) -> None:
        """Take a request's pages and slot. It queues again once the steps in flight have told its tokens."""
        self._counts["preemptions"] += 1
        request.num_preemptions += 1
        self._leave_slot(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        request.pooled = None
        self._requeue_if_preempted(request)

    def _requeue_if_preempted(self, request: Request) -> None:
        if request.status is RequestStatus.PREEMPTED and request.num_inflight_steps == 0:
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

        A request of it gives up its place or ends (see `step_too_large`), the next step admits nothing, and steps are half as
        large until they have grown back.
        """
        flight = self._in_flight.pop()
        self.kv_cache.zero_again(flight.step.zeroed_blocks)
        for child in flight.forked:
            if child.status is _RUNNING:  # else its request has ended, as below
                self._leave_slot(child)
        flight.take_back()
        self._counts["computed_tokens"] -= flight.step.total_num_tokens
        self._budget.shrink(flight.step.total_num_tokens)
        self._admits = False
        request, error = self._gave_way.choose(flight, self._running)
        if request is not None and error is not None:
            return [self.fail(request, error)]
        if request is not None:
            self._preempt(request)
        return []

    # -- take a step's result ---------------------------------------------------------------------------------------

    def update(self, result: ModelRunnerOutput) -> list[RequestOutput]:
        """Append the oldest step's tokens, end what is finished and return what there is to tell."""
        flight = self._in_flight.popleft()
        assert result.step_id == flight.step.step_id, "results come in the order of the steps"
        if flight.is_alone:
            for choice in self._siblings.of(flight.rows[0].request_id):
                choice.alone = False
        if result.prompt_logprobs or result.pooled:
            flight.take_prompt_values(result)
        bad = [flight.rows[row] for row in dict.fromkeys(result.bad_rows)]
        outputs = [self._fail_for_bad_numbers(request) for request in bad if request.status is _RUNNING]
        outputs += self._take_chunks(flight)
        sampled, num_silent = flight.sampled + flight.forked, len(outputs)
        for request, token_id, logprobs in zip(sampled, result.token_ids, result.logprobs, strict=True):
            request.num_inflight_steps -= 1
            if request.status is not _FINISHED:  # else it ended or was aborted while this step was in flight
                outputs.append(self._take_token(request, token_id, logprobs))
        self._counts["generation_tokens"] += len(outputs) - num_silent
        self._budget.grow()
        self._gave_way.forget(sampled)
        return outputs

    def _take_chunks(self, flight: InFlightStep) -> list[RequestOutput]:
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
        self._gave_way.forget((request,))
        self._siblings.remove(request)

    # -- what others may know ---------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Gauges and counters of now; the core adds its steps' histograms."""
        num_waiting = sum(len(choices) for choices in self._siblings.by_id.values()) - len(self._running)
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
        return iter(self._siblings)

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots, statuses and pages agree."""
        self.kv_cache.check_integrity()
        slots = [request.slot for request in self._running]
        assert sorted(slots + self._free_slots) == list(range(self.max_num_seqs)), "a slot is lost or taken twice"
        assert all(request.status is RequestStatus.RUNNING for request in self._running)
        self._waiting.check_integrity()
        assert all(request.num_computed_tokens <= request.num_tokens_ahead for request in self.unfinished())
        assert all(request.num_computed_tokens <= request.page_capacity for request in self._running), "a position has no page"
