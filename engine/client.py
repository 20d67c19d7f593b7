"""EngineClient: a frontend's side of the border. Owns the open streams and their detokenizers, and aborts what is abandoned."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import msgspec
import zmq

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
    Pooling,
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

CONNECT_AGAIN_MS = 10  # the engine binds its address a moment after it was started, and loads once it has heard of us

# Messages taken in before the streams get to write: as many steps go into one event of a frontend that is behind.
MAX_MESSAGES_A_TURN = 16


class ChoiceDelta(msgspec.Struct, gc=False):
    """What is new of one choice. text: new and safe to send; token_ids and logprobs: the new tokens.

    finish_reason: "stop" | "length", on the last one. stop_reason: the stop string, or the caller's stop token
    id, that ended it; None for the model's own end.
    prompt_logprobs: with the first delta of the choice, when asked for. queue_s, prefill_s: with the first one; embedding too.
    num_preemptions: so far.
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
    embedding: bytes | None = None
    num_preemptions: int = 0

    def extend(self, later: ChoiceDelta) -> None:
        """Take in the choice's next delta: what comes with the first one stays, the end is the later one's."""
        self.text += later.text
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason
        self.num_preemptions = later.num_preemptions


class Embedding(NamedTuple):
    """A prompt's vector: float32, little endian, not normalised."""

    vector: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_s: float | None
    prefill_s: float | None


class _Choice:
    """What the frontend knows of one choice: its text so far lives in the detokenizer."""

    __slots__ = ("detokenizer", "finished", "num_tokens")

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.num_tokens = 0
        self.finished = False


class RequestStream:
    """Iterates over what is new, a ChoiceDelta for each choice that has something; ends when every choice has.

    A reader that keeps up sees a delta for every output of the engine. What comes in while it is behind is joined on arrival:
    it then gets few long deltas instead of many short ones, and neither its time nor our memory goes into their number.

    shortcut: takes what is new in the reader's place, without waking its task, while that waits and the stream goes on. It
    returns what the reader then has to await first, or None; what it raises, the reader gets.

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
        self.finished = False
        self.shortcut: Callable[[list[ChoiceDelta]], Awaitable[None] | None] | None = None
        self._choices = choices
        self._num_unfinished = len(choices)
        self._eos_token_ids = eos_token_ids
        self._abort = abort
        self._news: list[ChoiceDelta] = []
        self._error: OctavoError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished: Awaitable[None] | None = None

    def take(self, output: RequestOutput) -> int | None:
        """Add an engine output; returns the choice's index when a stop string ended it, so that the engine can be told.

        The reader hears of it with the next `deliver`.
        """
        if output.error is not None:
            self.fail(output.error.to_exception())
            return None
        choice = self._choices[output.choice_index]
        if choice.finished:
            return None  # tokens that were on their way when a stop string ended it
        token_ids, logprobs = output.token_ids, output.logprobs
        if skip := choice.num_tokens - output.first_token_index:
            assert skip > 0, "the engine left out a token"
            token_ids = token_ids[skip:]
            logprobs = None if logprobs is None else logprobs[skip:]
        choice.num_tokens += len(token_ids)
        if output.finish_reason is None and len(token_ids) == 1 and choice.detokenizer.is_plain:
            delta = ChoiceDelta(output.choice_index, choice.detokenizer.push(token_ids[0]), token_ids, logprobs)
            stopped = False
        else:
            delta, stopped = self._read(choice, output, token_ids, logprobs)
        if output.first_token_index == 0:
            delta.prompt_logprobs = output.prompt_logprobs
            delta.num_cached_tokens = output.num_cached_tokens
            delta.queue_s, delta.prefill_s = output.queue_s, output.prefill_s
            delta.embedding = output.embedding
        delta.num_preemptions = output.num_preemptions
        if delta.finish_reason is not None:
            choice.finished = True
            self._num_unfinished -= 1
            self.finished = not self._num_unfinished
        for unread in self._news:
            if unread.choice_index == delta.choice_index:
                unread.extend(delta)
                break
        else:
            self._news.append(delta)
        return output.choice_index if stopped and output.finish_reason is None else None

    def _read(
        self, choice: _Choice, output: RequestOutput, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> tuple[ChoiceDelta, bool]:
        """The delta of tokens among which the choice may end, and whether a stop string has ended it."""
        # A token that only ends the text, like an end-of-turn mark, is counted but has no place in it.
        text = choice.detokenizer.append(token_ids if output.stop_token_id is None else token_ids[:-1])
        if text.stop is not None:
            logprobs = None if logprobs is None else logprobs[: text.num_tokens]
            seen = token_ids[: text.num_tokens]
            return ChoiceDelta(output.choice_index, text.text, seen, logprobs, "stop", text.stop), True
        rest = choice.detokenizer.finish() if output.finish_reason is not None else ""
        stop_reason = None if output.stop_token_id in self._eos_token_ids else output.stop_token_id
        text_now = text.text + rest
        return ChoiceDelta(output.choice_index, text_now, token_ids, logprobs, output.finish_reason, stop_reason), False

    def fail(self, error: OctavoError) -> None:
        """End the stream with an error, after what has arrived."""
        self._error = error
        self.finished = True

    def deliver(self) -> None:
        """Give the reader what is new, if it waits for it. One that is busy finds it by itself."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self.shortcut is not None and not self.finished:
            news, self._news = self._news, []
            try:
                self._unfinished = self.shortcut(news)
            except Exception as error:  # the other streams are not to suffer for it
                self._unfinished = _raise(error)
            if self._unfinished is None:
                return
        waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        while not self._news:
            if self._error is not None:
                raise self._error
            if self.finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if self._unfinished is not None:
                unfinished, self._unfinished = self._unfinished, None
                await unfinished
        news, self._news = self._news, []
        return news

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Free what the engine still holds for this stream. Harmless when it has finished."""
        self._abort(self.request_id)


async def _raise(error: Exception) -> None:
    raise error


class EngineClient:
    """One frontend's connection to one engine. `start` returns at once; `state` tells how far the engine is."""

    def __init__(self, supervisor: Supervisor, *, chat_template: str | None = None) -> None:
        self._supervisor = supervisor
        self._chat_template = chat_template
        self._client_id = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._streams: dict[str, RequestStream] = {}
        self._touched: dict[str, RequestStream] = {}
        self._answers: dict[str, asyncio.Future[None]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._read_again: asyncio.Handle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
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
        self._socket.setsockopt(zmq.RECONNECT_IVL, CONNECT_AGAIN_MS)
        self._socket.connect(self._supervisor.address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._send(Hello())
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
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
        if self._read_again is not None:
            self._read_again.cancel()
        self._context.destroy(linger=0)

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
    ) -> RequestStream:
        """Queue a request; returns once the engine has accepted it. Raises InvalidRequest where it refuses."""
        if self.state != "ready":
            raise self._unavailable()
        choices = [
            _Choice(
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
        )
        return await self._submit(message, choices)

    async def embed(
        self, prompt_token_ids: list[int], *, pooling: Pooling, cache_salt: str = "", priority: int = 0
    ) -> Embedding:
        """The embedding of a prompt, computed among the other requests; given up where the caller is cancelled.

        Raises InvalidRequest where the engine refuses it, RequestFailed or EngineUnavailable where it gives up.
        """
        if self.state != "ready":
            raise self._unavailable()
        message = AddRequest(
            request_id=self._new_id(),
            prompt_token_ids=prompt_token_ids,
            sampling=SamplingParams(max_tokens=0),
            cache_salt=cache_salt,
            priority=priority,
            pooling=pooling,
        )
        choices = [_Choice(self.tokenizer.detokenizer())]
        async with await self._submit(message, choices) as stream:
            async for (delta,) in stream:
                assert delta.embedding is not None, "the engine left out the embedding"
                return Embedding(
                    delta.embedding, len(prompt_token_ids), delta.num_cached_tokens, delta.queue_s, delta.prefill_s
                )
        raise AssertionError("a stream ends with an answer or an error")

    def _new_id(self) -> str:
        return f"{self._client_id}:{next(self._numbers)}"

    async def _submit(self, message: AddRequest, choices: list[_Choice]) -> RequestStream:
        request_id = message.request_id
        stream = RequestStream(request_id, len(message.prompt_token_ids), choices, self._eos_token_ids, self._abandon)
        answer = asyncio.get_running_loop().create_future()
        self._streams[request_id] = stream
        self._answers[request_id] = answer
        self._send(message)
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
        # The socket has no high-water mark, so this never blocks.
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        # Sending may take in, and so silence, the signal of a message that has come.
        self._read_soon()

    def _read_soon(self) -> None:
        if self._read_again is None and self._loop is not None:
            self._read_again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        """Take in what has come. The socket's descriptor signals once for all messages, so they are read until there is none.

        Streams hear of it at the end: all steps of a turn go into one event. A zmq.asyncio socket would need futures for every
        message, and never let go while messages come in.
        """
        if self._read_again is not None:
            self._read_again.cancel()
            self._read_again = None
        try:
            for _ in range(MAX_MESSAGES_A_TURN):
                self._dispatch(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            self._read_soon()
        except zmq.Again:
            pass
        except Exception as error:
            # The loop would only log it: without this, every stream would wait for ever.
            logger.exception("reading from the engine failed")
            self._fail_engine(EngineUnavailable(f"reading from the engine failed: {error}"))
        self._deliver()

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
        streams = self._streams
        for output in message.outputs:
            stream = streams.get(output.request_id)
            if stream is None:
                continue  # abandoned while this was on its way
            self._touched[output.request_id] = stream
            stopped_choice = stream.take(output)
            if stopped_choice is not None:
                self._send(Abort(output.request_id, stopped_choice))
            if stream.finished:
                del streams[output.request_id]

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
            stream.deliver()
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
