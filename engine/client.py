"""EngineClient: a frontend's side of the border. Owns the open streams and their detokenizers, and aborts what is abandoned."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from engine.detokenizer import Detokenizer
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
    Hello,
    LoadProgress,
    Refused,
    RequestOutput,
    Shutdown,
    StepOutputs,
    TokenLogprobs,
)
from engine.sampling_params import SamplingParams
from engine.supervisor import Supervisor
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "failed", "stopping"]


class ChoiceDelta(msgspec.Struct):
    """One event of one choice. text: what is new and safe to send; token_ids and logprobs: the new tokens.

    finish_reason: "stop" | "length", on the last event. stop_reason: the stop string, or the caller's stop token
    id, that ended it; None for the model's own end.
    prompt_logprobs: with the first event of the choice, when asked for. queue_s, prefill_s: with the first event.
    """

    choice_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None


class _Choice:
    """What the frontend knows of one choice: its text so far lives in the detokenizer."""

    __slots__ = ("detokenizer", "finished", "num_tokens")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.num_tokens = 0
        self.finished = False


class RequestStream:
    """Iterates over lists of ChoiceDelta, all that has arrived since the last look; ends when every choice has.

    Raises RequestFailed or EngineUnavailable where the engine gave up. Leaving the `async with` aborts what is unfinished.
    """

    def __init__(
        self,
        request_id: str,
        num_prompt_tokens: int,
        choices: list[_Choice],
        eos_token_ids: frozenset[int],
        abort: Callable[[str], None],
    ) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self._choices = choices
        self._eos_token_ids = eos_token_ids
        self._abort = abort
        self._deltas: list[ChoiceDelta] = []
        self._error: OctavoError | None = None
        self._arrived = asyncio.Event()

    @property
    def finished(self) -> bool:
        return self._error is not None or all(choice.finished for choice in self._choices)

    def take(self, output: RequestOutput) -> int | None:
        """Add an engine output; returns the choice's index when a stop string ended it, so that the engine can be told."""
        choice = self._choices[output.choice_index]
        if output.error is not None:
            self.fail(output.error.to_exception())
            return None
        skip = choice.num_tokens - output.first_token_index
        assert skip >= 0, "the engine left out a token"
        if choice.finished:
            return None  # tokens that were on their way when a stop string ended it
        token_ids = output.token_ids[skip:]
        choice.num_tokens += len(token_ids)
        # A token that only ends the text, like an end-of-turn mark, is counted but has no place in it.
        visible = token_ids if output.stop_token_id is None else token_ids[:-1]
        text = choice.detokenizer.append(visible)
        delta = ChoiceDelta(
            choice_index=output.choice_index,
            text=text.text,
            token_ids=token_ids,
            logprobs=output.logprobs[skip:] if output.logprobs is not None else None,
            finish_reason=output.finish_reason,
            stop_reason=None if output.stop_token_id in self._eos_token_ids else output.stop_token_id,
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens,
            queue_s=output.queue_s,
            prefill_s=output.prefill_s,
        )
        if text.stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", text.stop
            delta.token_ids = token_ids[: text.num_tokens]
            delta.logprobs = None if delta.logprobs is None else delta.logprobs[: text.num_tokens]
        elif output.finish_reason is not None:
            delta.text += choice.detokenizer.finish()
        choice.finished = delta.finish_reason is not None
        self._deltas.append(delta)
        self._arrived.set()
        return output.choice_index if text.stop is not None and output.finish_reason is None else None

    def fail(self, error: OctavoError) -> None:
        """End the stream with an error, after what has arrived."""
        self._error = error
        self._arrived.set()

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self.finished:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        deltas, self._deltas = self._deltas, []
        return deltas

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Free what the engine still holds for this stream. Harmless when it has finished."""
        self._abort(self.request_id)


class EngineClient:
    """One frontend's connection to one engine. `start` returns at once; `state` tells how far the engine is."""

    def __init__(self, supervisor: Supervisor, *, chat_template: str | None = None) -> None:
        self._supervisor = supervisor
        self._chat_template = chat_template
        self._client_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._streams: dict[str, RequestStream] = {}
        self._answers: dict[str, asyncio.Future[None]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self.state: State = "starting"
        self.progress: LoadProgress | None = None
        self.failure: OctavoError | None = None
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self._tokenizer: Tokenizer | None = None
        self._eos_token_ids: frozenset[int] = frozenset()
        self.on_progress: Callable[[LoadProgress], None] = lambda progress: None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineUnavailable until the engine has said which model it is."""
        if self._tokenizer is None:
            raise self._unavailable()
        return self._tokenizer

    async def start(self) -> None:
        """Start the engine process and connect to it."""
        self._socket.setsockopt(zmq.IDENTITY, self._client_id.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(self._supervisor.address)
        self._send(Hello())
        self._reader = asyncio.create_task(self._read())
        await self._supervisor.start(self._engine_ended)

    async def wait_until_ready(self) -> EngineReady:
        """Wait for the engine. Raises what kept it from starting."""
        while self.state == "starting":
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready" or self.ready is None:
            raise self._unavailable()
        return self.ready

    async def stop(self) -> None:
        """Fail what is open, and end the engine process."""
        if self.state != "failed":
            self.state = "stopping"
        self._fail_all(EngineUnavailable("the server is shutting down"))
        self._send(Shutdown())
        if self._supervisor.pid is not None and self.ready is None:
            self._supervisor.kill()  # it is loading and reads no messages
        await self._supervisor.stop()
        if self._reader is not None:
            self._reader.cancel()
        self._context.destroy(linger=0)

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        cache_salt: str = "",
    ) -> RequestStream:
        """Queue a request; returns once the engine has accepted it. Raises InvalidRequest where it refuses."""
        if self.state != "ready":
            raise self._unavailable()
        request_id = f"{self._client_id}:{next(self._numbers)}"
        choices = [
            _Choice(
                self.tokenizer.detokenizer(
                    prompt_token_ids,
                    stop=stop,
                    include_stop_str_in_output=include_stop_str_in_output,
                    skip_special_tokens=skip_special_tokens,
                    min_tokens=sampling.min_tokens,
                )
            )
            for _ in range(sampling.n)
        ]
        stream = RequestStream(request_id, len(prompt_token_ids), choices, self._eos_token_ids, self._abandon)
        answer = asyncio.get_running_loop().create_future()
        self._streams[request_id] = stream
        self._answers[request_id] = answer
        self._send(
            AddRequest(request_id=request_id, prompt_token_ids=prompt_token_ids, sampling=sampling, cache_salt=cache_salt)
        )
        try:
            await answer
        except BaseException:  # refused, or the caller was cancelled while waiting
            self._abandon(request_id)
            raise
        finally:
            del self._answers[request_id]
        return stream

    @property
    def num_open_streams(self) -> int:
        return len(self._streams)

    def _abandon(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None and not stream.finished and self.state in ("ready", "stopping"):
            self._send(Abort(request_id))

    def _send(self, message: FrontendMessage) -> None:
        # The socket has no high-water mark, so this never blocks; the future is done when it returns.
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def _read(self) -> None:
        try:
            while True:
                payload = await self._socket.recv()
                self._dispatch(self._decoder.decode(payload))
        except Exception as error:
            # Nobody awaits this task while it runs: without this, every stream would wait for ever.
            logger.exception("reading from the engine failed")
            self._fail_engine(EngineUnavailable(f"reading from the engine failed: {error}"))

    def _dispatch(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs():
                if message.epoch == self._supervisor.epoch:
                    self._take(message)
            case Accepted():
                self._answer(message.request_id, None)
            case Refused():
                self._answer(message.request_id, message.error.to_exception())
            case LoadProgress():
                self.progress = message
                self.on_progress(message)
            case EngineReady():
                self._become_ready(message)
            case EngineFailed():
                self._fail_engine(message.error.to_exception())

    def _take(self, message: StepOutputs) -> None:
        if message.stats is not None:
            self.stats = message.stats
        for output in message.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # abandoned while this was on its way
            stopped_choice = stream.take(output)
            if stopped_choice is not None:
                self._send(Abort(output.request_id, stopped_choice))
            if stream.finished:
                del self._streams[output.request_id]

    def _answer(self, request_id: str, error: OctavoError | None) -> None:
        answer = self._answers.get(request_id)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            self._streams.pop(request_id, None)
            answer.set_exception(error)

    def _become_ready(self, ready: EngineReady) -> None:
        try:
            self._tokenizer = Tokenizer.load(Path(ready.model_dir), chat_template=self._chat_template)
        except OctavoError as error:
            self._fail_engine(error)
            return
        self.ready = ready
        self._eos_token_ids = frozenset(ready.eos_token_ids)
        self.state = "ready"
        self._changed.set()

    def _engine_ended(self, returncode: int) -> None:
        if self.state == "starting":
            self._fail_engine(ModelLoadError(f"the engine process ended while loading (exit code {returncode})"))
        elif self.state == "ready":
            self._fail_engine(EngineUnavailable(f"the engine process died (exit code {returncode})"))

    def _fail_engine(self, error: OctavoError) -> None:
        if self.state == "failed":
            return
        self.state, self.failure = "failed", error
        self._fail_all(RequestFailed(f"the request was lost: {error.message}"))
        self._changed.set()

    def _fail_all(self, error: OctavoError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)

    def _unavailable(self) -> OctavoError:
        if self.failure is not None:
            return self.failure
        if self.state == "stopping":
            return EngineUnavailable("the server is shutting down")
        phase = f" ({self.progress.phase})" if self.progress else ""
        return EngineUnavailable(f"the engine is still starting{phase}; try again in a few seconds")
