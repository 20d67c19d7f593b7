"""EngineClient: a frontend's side of the border. Owns the open streams and their detokenizers, aborts what is abandoned, and
carries the open requests over to the next engine when one dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from engine.config import EarlierLife
from engine.engine_connection import EngineConnection
from engine.errors import EngineUnavailable, ModelLoadError, OctavoError, RequestFailed
from engine.messages import (
    Abort,
    Accepted,
    AddRequest,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineStats,
    FrontendMessage,
    LoadProgress,
    Pooling,
    Refused,
    RequestOutput,
    ResetPrefixCache,
    SetLogLevel,
    Shutdown,
    StepOutputs,
)
from engine.open_requests import OpenRequests
from engine.recovery import Recovery
from engine.request_stream import Choice, RequestStream
from engine.sampling_params import SamplingParams
from engine.step_probe import StepProbe
from engine.supervisor import Death, Supervisor
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "recovering", "failed", "stopping"]

ASK_AGAIN_S = 0.5


class Embedding(NamedTuple):
    """A prompt's vector: float32, little endian, not normalised."""

    vector: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_s: float | None
    prefill_s: float | None


class EngineClient:
    """One frontend's connection to one engine after the other. `start` returns at once; `state` tells how far the engine is.

    stats: counters are sums over all engines, gauges the present one's.
    """

    def __init__(self, supervisor: Supervisor, *, chat_template: str | None = None) -> None:
        self._supervisor = supervisor
        self._chat_template = chat_template
        self._client_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._open = OpenRequests()
        self._touched: dict[str, RequestStream] = {}
        self._changed = asyncio.Event()
        self._connection: EngineConnection | None = None
        self._probe = StepProbe(self._new_id, self._send)
        self._recovery = Recovery(
            supervisor.recovery,
            self._open,
            start=self._start_engine,
            is_wanted=lambda: self.state == "recovering",
            fail=self._fail_engine,
        )
        self._load_failure: OctavoError | None = None
        self._log_level: str | None = None
        self._start_s = 0.0  # of the present engine, as far as it knows
        self._earlier_stats = EngineStats()
        self.state: State = "starting"
        self.progress: LoadProgress | None = None
        self.failure: OctavoError | None = None
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self._tokenizer: Tokenizer | None = None
        self._eos_token_ids: frozenset[int] = frozenset()
        self.on_progress: Callable[[LoadProgress], None] = lambda progress: None

    @property
    def num_restarts(self) -> int:
        """Engines that took a dead one's place."""
        return self._recovery.lives.num_restarts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineUnavailable until the engine has said which model it is."""
        if self._tokenizer is None:
            raise self._unavailable()
        return self._tokenizer

    async def start(self) -> None:
        """Start the engine process and connect to it."""
        await self._start_engine(None)

    async def _start_engine(self, earlier: EarlierLife | None) -> None:
        await self._supervisor.start(self._leave_engine, self._engine_died, earlier)
        try:
            self._connection = EngineConnection(
                self._supervisor.address, self._client_id, self._dispatch, self._deliver, self._reading_failed
            )
        except OSError as error:
            self._end_useless(f"it cannot be connected to: {error.strerror}")
            return
        if self._log_level is not None:  # which may have been set since this engine was told how to log
            self._send(SetLogLevel(self._log_level))

    async def wait_until_ready(self) -> EngineReady:
        """Wait for the engine. Raises what kept it from starting."""
        while self.state in ("starting", "recovering"):
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready" or self.ready is None:
            raise self._unavailable()
        return self.ready

    async def stop(self) -> None:
        """Fail what is open, and end the engine process."""
        is_loading = self.state in ("starting", "recovering")
        if self.state != "failed":
            self.state = "stopping"
        self._open.fail_all(EngineUnavailable("the server is shutting down"))
        self._send(Shutdown())
        if is_loading:
            self._supervisor.kill()  # it reads no messages
        await self._recovery.ended()
        await self._supervisor.stop()
        if self._connection is not None:
            self._connection.close()

    async def can_step(self) -> bool:
        """Whether the engine gets on: a step has completed a moment ago, or a small one does now (within a second)."""
        if self.state != "ready" or not self._supervisor.is_well():
            return False
        return await self._probe.succeeds() or (self.stats.num_running > 0 and self._supervisor.is_well())

    def reset_prefix_cache(self) -> None:
        """Let no later request find its prefix among the pages of today. Raises EngineUnavailable while there is no engine."""
        if self.state != "ready":
            raise self._unavailable()
        self._send(ResetPrefixCache())

    def set_log_level(self, level: str) -> None:
        """What the engine logs from now on, and every engine after it. level: a name of logging's, in small letters."""
        self._log_level = level
        self._supervisor.log_at(level)
        if self.state in ("starting", "ready", "recovering"):  # otherwise nobody listens any more
            self._send(SetLogLevel(level))

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        cache_salt: str = "",
        priority: int = 0,
        first_token_deadline_s: float | None = None,
        deadline_s: float | None = None,
    ) -> RequestStream:
        """Queue a request; returns once the engine has accepted it. Deadlines are times of time.monotonic().

        Raises InvalidRequest where the engine refuses it, DeadlineExceeded where it is late already.
        """
        self._check_open()
        choices = [
            Choice(
                self.tokenizer.detokenizer(
                    prompt_token_ids,
                    stop=stop,
                    include_stop_str_in_output=include_stop_str_in_output,
                    skip_special_tokens=skip_special_tokens,
                    spaces_between_special_tokens=spaces_between_special_tokens,
                    min_tokens=sampling.min_tokens,
                )
            )
            for _ in range(sampling.n)
        ]
        message = AddRequest(
            request_id=self._new_id(),
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            cache_salt=cache_salt,
            priority=priority,
            first_token_deadline_s=first_token_deadline_s,
            deadline_s=deadline_s,
        )
        return await self._submit(message, choices)

    async def embed(
        self,
        prompt_token_ids: list[int],
        *,
        pooling: Pooling,
        cache_salt: str = "",
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Embedding:
        """The embedding of a prompt, computed among the other requests; given up where the caller is cancelled.

        Raises InvalidRequest where the engine refuses it; RequestFailed, DeadlineExceeded, EngineUnavailable where it gives up.
        """
        self._check_open()
        message = AddRequest(
            request_id=self._new_id(),
            prompt_token_ids=prompt_token_ids,
            sampling=SamplingParams(max_tokens=0),
            cache_salt=cache_salt,
            priority=priority,
            deadline_s=deadline_s,
            pooling=pooling,
        )
        choices = [Choice(self.tokenizer.detokenizer())]
        async with await self._submit(message, choices) as stream:
            async for (delta,) in stream:
                assert delta.embedding is not None, "the engine left out the embedding"
                return Embedding(
                    delta.embedding, len(prompt_token_ids), delta.num_cached_tokens, delta.queue_s, delta.prefill_s
                )
        raise AssertionError("a stream ends with an answer or an error")

    def _new_id(self) -> str:
        return f"{self._client_id}:{next(self._numbers)}"

    def _check_open(self) -> None:
        if self.state not in ("ready", "recovering"):
            raise self._unavailable()

    async def _submit(self, message: AddRequest, choices: list[Choice]) -> RequestStream:
        stream = RequestStream(message, choices, self._eos_token_ids, self._abandon)
        answer = self._open.open(stream)
        try:
            if self.state == "ready":
                self._send(message)
                await answer
            else:  # it is sent with the others, once the next engine is ready
                await asyncio.wait_for(answer, self._supervisor.recovery.restart_wait_s)
        except BaseException as error:  # refused, or the caller was cancelled while waiting
            self._abandon(message.request_id)
            if isinstance(error, TimeoutError):
                raise self._unavailable() from None
            raise
        finally:
            self._open.answered(message.request_id)
        return stream

    @property
    def num_open_streams(self) -> int:
        return len(self._open.streams)

    def _abandon(self, request_id: str) -> None:
        stream = self._open.streams.pop(request_id, None)
        if stream is not None and not stream.finished and self.state in ("ready", "stopping"):
            self._send(Abort(request_id))

    def _send(self, message: FrontendMessage) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _reading_failed(self, error: Exception) -> None:
        self._fail_engine(EngineUnavailable(f"reading from the engine failed: {error}"))

    def _deliver(self) -> None:
        touched, self._touched = self._touched, {}
        for stream in touched.values():
            stream.deliver()

    def _dispatch(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs():
                if message.epoch == self._supervisor.epoch:
                    self._take(message)
            case Accepted():
                self._open.accept(message.request_id)
            case Refused():
                self._refuse(message.request_id, message.error.to_exception())
            case LoadProgress():
                self.progress = message
                self.on_progress(message)
            case EngineReady():
                self._become_ready(message)
            case EngineFailed():
                self._load_failure = message.error.to_exception()
                if self.ready is None:
                    self._fail_engine(self._load_failure)

    def _take(self, message: StepOutputs) -> None:
        if message.stats is not None:
            self.stats = message.stats.after(self._earlier_stats) if self.num_restarts else message.stats
        streams = self._open.streams
        suspects = self._open.suspects or None  # asked once, not for every output
        if message.outputs:
            self._probe.step_completed()
        for output in message.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                self._take_probe(output)
                continue  # or abandoned while this was on its way
            self._touched[output.request_id] = stream
            stopped_choice = stream.take(output)
            if stopped_choice is not None:
                self._send(Abort(output.request_id, stopped_choice))
            if stream.finished:
                del streams[output.request_id]
            if suspects is not None and output.token_ids:
                suspects.clear(output.request_id)

    def _refuse(self, request_id: str, error: OctavoError) -> None:
        """An engine that takes many requests over at once may not take one now that the engine before it had taken."""
        if self.num_restarts and isinstance(error, EngineUnavailable) and not self._open.is_awaited(request_id):
            loop, epoch = asyncio.get_running_loop(), self._supervisor.epoch
            loop.call_later(ASK_AGAIN_S, self._ask_again, request_id, epoch)
        else:
            self._open.fail(request_id, error)

    def _ask_again(self, request_id: str, epoch: int) -> None:
        stream = self._open.streams.get(request_id)
        if stream is not None and epoch == self._supervisor.epoch and self.state == "ready":
            self._replay(stream)

    # -- lives of the engine --------------------------------------------------------------------------------------------

    def _become_ready(self, ready: EngineReady) -> None:
        if self.ready is not None:
            decided, before = (ready.num_blocks, ready.max_model_len), (self.ready.num_blocks, self.ready.max_model_len)
            if decided == before:
                self._start_s = sum(ready.load_seconds.values())
                self._probe.send()  # its answer shows that this engine can complete a step
            else:
                self._end_useless(f"it decided on {decided} pages and context, where the first one had {before}")
            return
        try:
            self._tokenizer = Tokenizer.load(Path(ready.model_dir), chat_template=self._chat_template)
        except OctavoError as error:
            self._fail_engine(error)
            return
        self.ready = ready
        self._eos_token_ids = frozenset(ready.eos_token_ids)
        self._enter_ready()

    def _enter_ready(self) -> None:
        self.state = "ready"
        self._recovery.lives.ready()
        self._changed.set()

    def _take_probe(self, output: RequestOutput) -> None:
        if self._probe.take(output) and self.state == "recovering":
            if output.error is None:
                self._resume()
            else:
                self._end_useless(f"its first step failed: {output.error.message}")

    def _end_useless(self, why: str) -> None:
        """Kill an engine that has been started in vain."""
        self._load_failure = EngineUnavailable(why)
        self._supervisor.kill_this_life()

    def _resume(self) -> None:
        """The new engine is ready: it goes on with every open request, in the order in which they came."""
        logger.info(
            "the engine is ready again, %.2f s after the last one's death, %.2f s of them its start; %d requests go on",
            self._recovery.lives.since_death_s,
            self._start_s,
            len(self._open.streams),
        )
        self._enter_ready()
        for stream in list(self._open.streams.values()):
            self._replay(stream)

    def _replay(self, stream: RequestStream) -> None:
        self._send(stream.replay(alone=self._open.suspects.runs_alone(stream.request_id)))

    def _leave_engine(self) -> None:
        """Hear no more of the present engine: it has died, or is about to be killed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self.state == "ready":
            self.state = "recovering"
            self._recovery.lives.left()

    def _engine_died(self, death: Death) -> None:
        if self.state in ("failed", "stopping"):
            return
        if self._connection is not None:
            self._connection.read_rest()
        self._leave_engine()
        ready = self.ready
        if ready is None:
            self._fail_engine(self._load_failure or ModelLoadError(f"{death.cause} while it was loading"))
            return
        self._probe.forget()
        cause = f"{death.cause}: {self._load_failure.message}" if self._load_failure else death.cause
        self._load_failure = None
        if not self._recovery.count(death, cause):
            return
        self.progress = None
        self._earlier_stats = self.stats
        self.stats = self.stats.between_engines(len(self._open.streams))
        self._recovery.restart(ready)

    def _fail_engine(self, error: OctavoError) -> None:
        if self.state == "failed":
            return
        self.state, self.failure = "failed", error
        self._open.fail_all(RequestFailed(f"the request was lost: {error.message}"))
        self._changed.set()

    def _unavailable(self) -> OctavoError:
        if self.failure is not None:
            return self.failure
        if self.state == "stopping":
            return EngineUnavailable("the server is shutting down")
        phase = f" ({self.progress.phase})" if self.progress else ""
        if self.state == "recovering":
            sentence = f"the engine is being started again{phase}; try again in a few seconds"
            return EngineUnavailable(sentence, retry_after_s=self._recovery.lives.ready_in_s)
        return EngineUnavailable(f"the engine is still starting{phase}; try again in a few seconds")
