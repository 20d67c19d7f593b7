"""EngineClient: a frontend's side of the border. Owns the open streams and their detokenizers, and aborts what is abandoned."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import zmq

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
    Shutdown,
    StepOutputs,
)
from engine.request_stream import Choice, RequestStream
from engine.sampling_params import SamplingParams
from engine.supervisor import Supervisor
from engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "failed", "stopping"]

CONNECT_AGAIN_MS = 10  # the engine binds its address a moment after it was started, and loads once it has heard of us

# Messages taken in before the streams get to write: as many steps go into one event of a frontend that is behind.
MAX_MESSAGES_A_TURN = 16


class Embedding(NamedTuple):
    """A prompt's vector: float32, little endian, not normalised."""

    vector: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_s: float | None
    prefill_s: float | None


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
        first_token_deadline_s: float | None = None,
        deadline_s: float | None = None,
    ) -> RequestStream:
        """Queue a request; returns once the engine has accepted it. Deadlines are times of time.monotonic().

        Raises InvalidRequest where the engine refuses it, DeadlineExceeded where it is late already.
        """
        if self.state != "ready":
            raise self._unavailable()
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
        if self.state != "ready":
            raise self._unavailable()
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

    async def _submit(self, message: AddRequest, choices: list[Choice]) -> RequestStream:
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
