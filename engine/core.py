"""EngineCore: the step loop. Schedules, launches, samples and updates; knows requests and the runner, no sockets."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import msgspec

from engine.crash_points import ArmedCrashPoint
from engine.deadlines import overdue
from engine.errors import ContextLengthExceeded, InvalidRequest, OctavoError, OutOfDeviceMemory
from engine.flight_recorder import FlightRecorder
from engine.grammar_compiler import GrammarCompiler
from engine.messages import AddRequest, EngineStats, RequestOutput
from engine.request import Request
from engine.sampling_params import SamplingParams, choice_seed
from engine.scheduler import Scheduler
from engine.step import BAD_TOKEN, PendingOutput, Runner, SchedulerOutput
from engine.step_clock import StepClock

if TYPE_CHECKING:
    from engine.grammar import Grammar, MaskedRows, MaskMaker, Matcher

logger = logging.getLogger(__name__)


class EngineCore:
    """One model's engine. pipeline_depth: steps launched ahead of the oldest unread result (0 on a CPU, 1 on a GPU).

    eos_token_ids end every request that does not ask to ignore them. grammars: compiles those of requests; None where the model
    has no tokenizer.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        pipeline_depth: int,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pipeline_depth = pipeline_depth
        self._grammars = grammars
        self._compiling: dict[str, tuple[AddRequest, Future[Grammar]]] = {}
        self._mask_maker: MaskMaker | None = None
        self._mask_thread = ThreadPoolExecutor(1, "masks")
        self._in_flight: deque[PendingOutput] = deque()
        self._clock = StepClock()
        self._recorder: FlightRecorder | None = None
        self._crash_point: ArmedCrashPoint | None = None

    def watch(self, recorder: FlightRecorder, crash_point: ArmedCrashPoint | None = None) -> None:
        """Tell the recorder of every step; die at the crash point, in a test that has armed one."""
        self._recorder = recorder
        self._crash_point = crash_point

    def add(self, message: AddRequest) -> bool:
        """Queue a request. False: it waits for its grammar, and `take_compiled` will tell. Raises InvalidRequest or
        EngineUnavailable (and queues nothing) when it can never be served, or not now."""
        self._check(message)
        structured = message.sampling.structured
        if structured is None:
            self._queue(message, None)
            return True
        if self._grammars is None:
            raise InvalidRequest("this server cannot structure answers: the model has no tokenizer")
        future = self._grammars.compile(structured)
        if not future.done():
            self._compiling[message.request_id] = message, future
            return False
        self._queue(message, future.result())
        return True

    @property
    def is_compiling(self) -> bool:
        """Whether requests wait for their grammars."""
        return bool(self._compiling)

    def take_compiled(self) -> list[tuple[str, OctavoError | None]]:
        """Queue the requests whose grammars are there now. Returns their ids, and why where they are refused."""
        taken: list[tuple[str, OctavoError | None]] = []
        for request_id, (message, future) in list(self._compiling.items()):
            late = overdue(message)
            if late is None and not future.done():
                continue
            del self._compiling[request_id]
            try:
                if late is not None:
                    raise late
                self._queue(message, future.result())
                taken.append((request_id, None))
            except OctavoError as error:
                taken.append((request_id, error))
        return taken

    def _queue(self, message: AddRequest, grammar: Grammar | None) -> None:
        sampling = message.sampling
        stop_token_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_token_ids)
        replayed = message.output_token_ids or [[] for _ in range(sampling.n)]
        self._scheduler.add(
            [
                Request(
                    request_id=message.request_id,
                    choice_index=i,
                    token_ids=message.prompt_token_ids + replayed[i],
                    num_prompt_tokens=len(message.prompt_token_ids),
                    sampling=sampling,
                    seed=choice_seed(sampling.seed, i),
                    stop_token_ids=stop_token_ids,
                    cache_salt=message.cache_salt,
                    wants_prompt_logprobs=sampling.prompt_logprobs is not None and i == 0 and not replayed[0],
                    priority=message.priority,
                    pooling=message.pooling,
                    matcher=_matcher(sampling, grammar, replayed[i]),
                    alone=message.alone,
                    first_token_deadline_s=message.first_token_deadline_s,
                    deadline_s=message.deadline_s,
                )
                for i in range(sampling.n)
                if i not in message.finished_choices
            ]
        )

    def _check(self, message: AddRequest) -> None:
        sampling, num_prompt = message.sampling, len(message.prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens; give at least one", param="prompt")
        for token_id in (min(message.prompt_token_ids), max(message.prompt_token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"the prompt has token id {token_id}, allowed are 0 to {self._vocab_size - 1}", param="prompt"
                )
        for param, token_ids in sampling.token_ids().items():
            for token_id in token_ids:
                if not 0 <= token_id < self._vocab_size:
                    raise InvalidRequest(
                        f"{param} has token id {token_id}, allowed are 0 to {self._vocab_size - 1}", param=param
                    )
        if message.output_token_ids and len(message.output_token_ids) != sampling.n:
            raise InvalidRequest(f"output_token_ids has {len(message.output_token_ids)} lists for {sampling.n} choices")
        if not all(0 <= token_id < self._vocab_size for output in message.output_token_ids for token_id in output):
            raise InvalidRequest(f"output_token_ids has a token id outside 0 to {self._vocab_size - 1}")
        total, context = num_prompt + sampling.max_tokens, self._scheduler.max_model_len
        if total > context:
            raise ContextLengthExceeded(
                f"the context holds {context} tokens, but the prompt has {num_prompt} and {sampling.max_tokens} more are asked "
                f"for ({total} in all)",
                param="prompt",
            )
        if not self._scheduler.kv_cache.fits(total):
            fits = self._scheduler.kv_cache.max_request_tokens(context)
            raise ContextLengthExceeded(
                f"the KV cache of this server fits {fits} tokens of one request, but the prompt has {num_prompt} and "
                f"{sampling.max_tokens} more are asked for ({total} in all)",
                param="prompt",
            )

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        """End a request, or one of its choices, without further output."""
        if choice_index is None:
            self._compiling.pop(request_id, None)
        self._scheduler.abort(request_id, choice_index)

    def reset_prefix_cache(self) -> None:
        """Let no later request find its prefix among the pages of today."""
        self._scheduler.kv_cache.reset_prefix_cache()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_unfinished or bool(self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Plan and launch one step, and take the result of the oldest one that is due. Returns what became known."""
        started = time.monotonic()
        outputs = self._scheduler.expire()
        plan = self._scheduler.schedule()
        if plan is not None:
            self._tell_plan(plan)
            try:
                if self._scheduler.matchers():
                    self._launch_masked(plan, started, outputs)
                else:
                    self._runner.launch(plan)
                    self._in_flight.append(self._runner.sample(None))
                    self._clock.launched(plan.total_num_tokens, time.monotonic() - started)
            except OutOfDeviceMemory as error:
                logger.warning("out of memory: %s", error.message)
                outputs += self._scheduler.roll_back()
                if self._recorder is not None:
                    self._recorder.withdrawn()
                plan = None
        if self._in_flight and (plan is None or len(self._in_flight) > self._pipeline_depth):
            outputs += self._take_result()
        return outputs

    def _take_result(self) -> list[RequestOutput]:
        result = self._in_flight.popleft().wait()
        self._clock.finished()
        if self._crash_point is not None:
            self._crash_point.reached("after_sampling")
        token_ids = result.token_ids
        if token_ids and max(token_ids) >= self._vocab_size:  # a device whose memory is bad may say anything
            result.token_ids = [token_id if token_id < self._vocab_size else BAD_TOKEN for token_id in token_ids]
        outputs = self._scheduler.update(result)
        if self._recorder is not None:
            self._recorder.completed()
        return outputs

    def _tell_plan(self, plan: SchedulerOutput) -> None:
        if self._recorder is not None:
            self._recorder.launching(plan, self._scheduler.step_request_ids)
        if self._crash_point is not None:
            self._crash_point.planned(plan)
            self._crash_point.reached("before_step")

    def _launch_masked(self, plan: SchedulerOutput, started: float, outputs: list[RequestOutput]) -> None:
        """Launch a step of which some rows depend on the tokens before, and make their masks while the device computes. Tokens
        that are still on their way are waited for first; what they tell goes to `outputs`."""
        making = None if self._in_flight else self._mask_thread.submit(self._make_masks)
        try:
            self._runner.launch(plan)
        finally:
            made = None if making is None else making.result()
        self._clock.launched(plan.total_num_tokens, time.monotonic() - started)
        while self._in_flight:
            outputs += self._take_result()
        made = made or self._make_masks()
        try:
            self._in_flight.append(self._runner.sample(made.masks))
        except OutOfDeviceMemory:
            self._clock.withdrawn()
            raise
        outputs += [self._scheduler.fail_row(row, error) for row, error in made.errors.items()]

    def _make_masks(self) -> MaskedRows:
        if self._mask_maker is None:
            from engine.grammar import MaskMaker  # late, as in `_matcher`

            # Without a device of its own the model needs the cores itself.
            self._mask_maker = MaskMaker(num_threads=4 if self._pipeline_depth else 1)
        return self._mask_maker.make(cast("dict[int, Matcher]", self._scheduler.matchers()))

    def spare_s(self) -> float:
        """Seconds for which `step` may wait without the device running out of work: time for what arrives meanwhile."""
        if not self._pipeline_depth or not self._in_flight or self._in_flight[0].done():
            return 0.0
        return self._clock.spare_s()

    def idle(self) -> bool:
        """Let the runner do a piece of work that can wait; for moments without requests. Returns whether there is more."""
        return self._runner.idle()

    def stats(self) -> EngineStats:
        """The scheduler's gauges and counters, with the requests that wait for their grammars, and the steps' histograms."""
        stats = self._scheduler.stats()
        num_compiling = sum(message.sampling.n for message, _ in self._compiling.values())
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + num_compiling,
            num_deferred=stats.num_deferred + num_compiling,
            step_time=self._clock.step_time.counts(),
            step_tokens=self._clock.step_tokens.counts(),
        )

    def close(self) -> None:
        """End what runs beside the loop."""
        self._mask_thread.shutdown()
        if self._mask_maker is not None:
            self._mask_maker.close()
        if self._grammars is not None:
            self._grammars.close()

    def check_integrity(self) -> None:
        """Raise AssertionError when the books disagree; for tests."""
        self._scheduler.check_integrity()


def _matcher(sampling: SamplingParams, grammar: Grammar | None, replayed: list[int]) -> Matcher | None:
    """What follows the tokens of a choice, after those that an earlier engine brought; None where none is needed."""
    if not sampling.needs_matcher:
        return None
    from engine.grammar import Matcher  # late, with the library behind it: most engines never need it

    matcher = Matcher.of_bad_words(sampling) if grammar is None else grammar.start(sampling)
    for token_id in replayed:
        matcher.accept(token_id)
    return matcher
