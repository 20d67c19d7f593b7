"""One HTTP request's share of the engine: submitting its prompts, merging what comes back, and letting go of the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

import msgspec

from engine.errors import DeadlineExceeded, InvalidRequest
from engine.request_stream import ChoiceDelta, RequestStream
from engine.sampling_params import SamplingParams
from server.api.prompt_log import log_prompts
from server.api.sampling import SamplingRequest
from server.backlog import Ticket
from server.metrics import Finished
from server.request_record import MAX_PHASES, Event, Phases, current
from server.state import ServerState

TIME_DIGITS = 6

# A stream with no more time than this gets its status with its first token, or else a 504; one with more gets it at once, and
# comments that keep its connection open.
HOLD_S = 30.0


class Prompt(NamedTuple):
    """text is None where the caller gave token ids."""

    token_ids: list[int]
    text: str | None
    sampling: SamplingParams


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Explanation(msgspec.Struct):
    """What became of a request, for `explain: true`. Of several prompts: the longest times, and the sums of the numbers.

    queue_s: until the engine took it up. prefill_s: from then until its first token. ttft_s: from the request's arrival to its
    first token, None where none was asked for. seed: repeats the answer; one a prompt where they differ.
    """

    queue_s: float | None
    prefill_s: float | None
    ttft_s: float | None
    total_s: float
    cached_tokens: int
    preemptions: int
    seed: int | list[int]


class Usage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    octavo: Explanation | None = None


class _Choice:
    """What has come of one choice. first_s, last_s: time.monotonic() of its first and its last tokens."""

    __slots__ = ("first_s", "last_s", "num_tokens", "prefill_s")

    def __init__(self, now: float, prefill_s: float | None) -> None:
        self.first_s = self.last_s = now
        self.prefill_s = prefill_s
        self.num_tokens = 0


class Generation:
    """The engine requests of one HTTP request, one a prompt; made by `start` once the engine has accepted all of them."""

    def __init__(self, request_id: str, state: ServerState, prompts: Sequence[Prompt], arrival: float) -> None:
        self._record = current()
        self._record.response_id, self._record.sampling = request_id, prompts[0].sampling
        self._record.num_prompts = len(prompts)
        self._metrics = state.metrics
        self._backlog = state.backlog
        self._arrival = arrival
        self._sampling = prompts[0].sampling  # the others' differs in seed and max_tokens
        self._tickets: list[Ticket] = []
        self._held: tuple[int, list[ChoiceDelta]] | None = None
        self._merged: AsyncIterator[tuple[int, list[ChoiceDelta]]] | None = None
        self._streams: list[RequestStream] = []
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._record.prompt_tokens = self._num_prompt_tokens
        self._num_cached_tokens = 0
        self._num_reasoning_tokens: int | None = None
        self._num_preemptions = 0
        self._queue_s: float | None = None
        self._prefill_s: float | None = None
        self._explains = False
        self._seeds = list(dict.fromkeys(prompt.sampling.seed for prompt in prompts))
        self._num_choices = sum(prompt.sampling.n for prompt in prompts)
        self._finish_reasons: list[str] = []
        self._ttft_s: float | None = None
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._phases: dict[int, Phases] = {}
        self._failed = False
        self._closed = False

    @classmethod
    async def start(
        cls, state: ServerState, request_id: str, prompts: Sequence[Prompt], body: SamplingRequest, arrival: float
    ) -> Generation:
        """Raises Overloaded, or the engine's refusal of any of the prompts; then none of them is left running."""
        log_prompts(state, prompts)
        generation = cls(request_id, state, prompts, arrival)
        generation._explains, generation._record.stream = body.explain, body.stream
        stop, deadlines = body.stop_strings(), body.deadlines(arrival, state.config)
        works = [state.backlog.expect(len(prompt.token_ids), prompt.sampling) for prompt in prompts]
        generation._tickets = state.backlog.enter(works, state.require_ready())
        requests = [
            state.client.generate(
                prompt.token_ids,
                prompt.sampling,
                stop=stop,
                include_stop_str_in_output=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
                spaces_between_special_tokens=body.spaces_between_special_tokens,
                cache_salt=body.cache_salt,
                priority=body.priority,
                first_token_deadline_s=deadlines.first_token_s,
                deadline_s=deadlines.whole_s,
            )
            for prompt in prompts
        ]
        try:
            generation._streams = [await requests[0]] if len(requests) == 1 else await _all_or_none(requests)
        except BaseException as error:
            if isinstance(error, InvalidRequest) and error.param is None and prompts[0].sampling.structured is not None:
                error.param = body.structured_field() or "tools"  # the engine has seen a grammar, and no fields
            generation._note(error)
            generation._leave_backlog()
            if not generation._failed:
                generation._metrics.observe_abort()
            raise
        nearest_s = deadlines.nearest_s()
        if nearest_s is not None and nearest_s <= time.monotonic() + HOLD_S:
            await generation._hold()
        return generation

    async def _hold(self) -> None:
        """Wait for the first output, which `deltas` then begins with. Raises what comes instead."""
        try:
            if len(self._streams) == 1:
                first = await anext(aiter(self._streams[0]), None)
                self._held = None if first is None else (0, first)
            else:
                self._held = await anext(self._arriving(), None)
        except BaseException as error:
            self._note(error)
            self.close()
            raise
        if self._held is not None:
            self._observe(*self._held)

    def _arriving(self) -> AsyncIterator[tuple[int, list[ChoiceDelta]]]:
        if self._merged is None:
            self._merged = _merged(self._streams)
        return self._merged

    async def deltas(self) -> AsyncIterator[tuple[int, list[ChoiceDelta]]]:
        """(prompt index, what has arrived) until every choice of every prompt has finished.

        Raises RequestFailed, DeadlineExceeded.
        """
        try:
            if self._held is not None:
                held, self._held = self._held, None
                yield held
            if len(self._streams) == 1:
                async for deltas in self._streams[0]:
                    self._observe(0, deltas)
                    yield 0, deltas
                return
            async for prompt_index, deltas in self._arriving():
                self._observe(prompt_index, deltas)
                yield prompt_index, deltas
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: BaseException) -> None:
        self._failed = isinstance(error, Exception)
        if isinstance(error, DeadlineExceeded):
            self._metrics.observe_deadline(error.param)

    def set_shortcut(self, take: Callable[[int, list[ChoiceDelta]], Awaitable[None] | None]) -> None:
        """Let `take` have what `deltas` would give, while its reader waits (see RequestStream); with one prompt only."""

        def shortcut(deltas: list[ChoiceDelta]) -> Awaitable[None] | None:
            self._observe(0, deltas)
            return take(0, deltas)

        if len(self._streams) == 1:
            self._streams[0].shortcut = shortcut

    def count_reasoning(self, num_tokens: int) -> None:
        """So many of the output tokens were reasoning; 0 says that it would have been seen."""
        self._num_reasoning_tokens = (self._num_reasoning_tokens or 0) + num_tokens

    def usage(self) -> Usage:
        """Of all prompts and choices, as far as they have come."""
        reasoning = self._num_reasoning_tokens
        return Usage(
            self._num_prompt_tokens,
            self._num_output_tokens,
            self._num_prompt_tokens + self._num_output_tokens,
            PromptTokensDetails(self._num_cached_tokens),
            None if reasoning is None else CompletionTokensDetails(reasoning),
            self._explanation() if self._explains else None,
        )

    def _explanation(self) -> Explanation:
        return Explanation(
            queue_s=_rounded(self._queue_s),
            prefill_s=_rounded(self._prefill_s),
            ttft_s=_rounded(self._ttft_s),
            total_s=round(time.monotonic() - self._arrival, TIME_DIGITS),
            cached_tokens=self._num_cached_tokens,
            preemptions=self._num_preemptions,
            seed=self._seeds[0] if len(self._seeds) == 1 else self._seeds,
        )

    @property
    def _num_output_tokens(self) -> int:
        return sum(ticket.num_output_tokens for ticket in self._tickets)

    def close(self) -> None:
        """Aborts what has not finished, and accounts for the request. May be called again."""
        if self._closed:
            return
        self._closed = True
        for stream in self._streams:
            stream.abort()
            stream.shortcut = None  # it knows us: request and answer would stay until a garbage collection
        self._leave_backlog()
        self._account()
        self._write_down()

    def _account(self) -> None:
        """For the metrics, and for what is expected of later requests."""
        metrics = self._metrics
        unfinished = self._num_choices - len(self._finish_reasons)
        reasons = ["error" if self._failed else "abort"] * unfinished
        self._finish_reasons += reasons
        for reason in reasons:
            metrics.observe_finish(reason)
        metrics.observe_tokens(self._record.key_id, self._num_prompt_tokens, self._num_output_tokens)
        if unfinished and not self._failed:
            metrics.observe_abort()
        if not unfinished:
            finished = Finished(
                seconds=time.monotonic() - self._arrival,
                num_prompt_tokens=self._num_prompt_tokens,
                num_cached_tokens=self._num_cached_tokens,
                num_output_tokens=self._num_output_tokens,
                longest=max(choice.num_tokens for choice in self._choices.values()),
                max_tokens=self._sampling.max_tokens,
                n=self._sampling.n,
            )
            metrics.observe_request(finished)
            self._backlog.learn(self._sampling, self._num_output_tokens / self._num_choices)

    def _write_down(self) -> None:
        """For the request's line in the log and its trace."""
        record = self._record
        record.cached_tokens, record.output_tokens = self._num_cached_tokens, self._num_output_tokens
        record.reasoning_tokens = self._num_reasoning_tokens
        record.queue_s, record.prefill_s, record.ttft_s = self._queue_s, self._prefill_s, self._ttft_s
        record.finish_reasons, record.preemptions = self._finish_reasons, self._num_preemptions
        for (prompt_index, _), choice in self._choices.items():
            phases = self._phases.get(prompt_index)
            if phases is not None and choice.last_s > phases.last_s:
                self._phases[prompt_index] = phases._replace(last_s=choice.last_s)
        record.phases = list(self._phases.values())
        record.events = [Event(*event) for stream in self._streams for event in stream.events]

    def _leave_backlog(self) -> None:
        for ticket in self._tickets:
            ticket.close()

    def _observe(self, prompt_index: int, deltas: list[ChoiceDelta]) -> None:
        now, ticket = time.monotonic(), self._tickets[prompt_index]
        for delta in deltas:
            key = (prompt_index, delta.choice_index)
            choice = self._choices.get(key)
            previous_s = None if choice is None else choice.last_s
            if choice is None:
                choice = self._choices[key] = _Choice(now, delta.prefill_s)
                ticket.start()
                if delta.choice_index == 0:
                    self._begin(prompt_index, delta, now)
            if delta.token_ids:
                num_tokens = len(delta.token_ids)
                choice.num_tokens += num_tokens
                choice.last_s = now
                ticket.num_output_tokens += num_tokens
                if self._ttft_s is None:
                    self._ttft_s = now - self._arrival
                    self._metrics.observe_first_token(self._ttft_s)
                elif previous_s is not None:
                    self._metrics.observe_inter_token(now - previous_s)
            if delta.finish_reason is not None:
                self._finish_reasons.append(delta.finish_reason)
                self._num_preemptions += delta.num_preemptions
                ticket.end_choice()
                decode_s = choice.last_s - choice.first_s
                self._metrics.observe_choice(delta.finish_reason, choice.prefill_s, decode_s, choice.num_tokens)

    def _begin(self, prompt_index: int, delta: ChoiceDelta, now: float) -> None:
        """A prompt has been computed: this is the first of its first choice."""
        self._num_cached_tokens += delta.num_cached_tokens
        self._queue_s = _longer(self._queue_s, delta.queue_s)
        self._prefill_s = _longer(self._prefill_s, delta.prefill_s)
        self._metrics.observe_prompt(delta.queue_s, delta.prefill_s)
        if delta.queue_s is not None and delta.prefill_s is not None and len(self._phases) < MAX_PHASES:
            self._phases[prompt_index] = Phases(delta.queue_s, delta.prefill_s, now, now)


def _longer(one: float | None, other: float | None) -> float | None:
    return max((seconds for seconds in (one, other) if seconds is not None), default=None)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, TIME_DIGITS)


async def _all_or_none(requests: Sequence[Coroutine[Any, Any, RequestStream]]) -> list[RequestStream]:
    """The streams of all requests; where one is refused, the others are aborted. Raises the refusal.

    All at once: the engine answers between two steps, and a step a prompt would be long.
    """
    answers = [asyncio.create_task(request) for request in requests]
    try:
        return list(await asyncio.gather(*answers))
    except BaseException:
        for answer in answers:
            answer.cancel()
        for result in await asyncio.gather(*answers, return_exceptions=True):
            if not isinstance(result, BaseException):
                result.abort()
        raise


async def _merged(streams: Sequence[RequestStream]) -> AsyncIterator[tuple[int, list[ChoiceDelta]]]:
    queue: asyncio.Queue[tuple[int, list[ChoiceDelta] | None]] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for deltas in stream:
                queue.put_nowait((index, deltas))
        finally:
            queue.put_nowait((index, None))

    pumps: list[asyncio.Task[None]] = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            index, batch = await queue.get()
            if batch is not None:
                yield index, batch
                continue
            num_open -= 1
            await pumps[index]
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
