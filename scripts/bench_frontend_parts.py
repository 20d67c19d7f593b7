"""What a streamed token costs the frontend, part by part, on its real functions in one process; used by bench_frontend.py.

Every step brings each of the open streams one token. Measured are, one inside the other: decoding the message; that and the
text of every token; that and the JSON of every event; all of it through the application and uvicorn's protocol onto transports
that throw the bytes away; the same onto sockets that another process reads. A part is the difference of two.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import random
import selectors
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop
from bench_frontend_engine import make_ready, word_ids_of
from bench_serving import WORDS
from uvicorn.server import ServerState

from engine.client import EngineClient
from engine.config import EngineConfig, ModelConfig
from engine.messages import Accepted, AddRequest, EngineMessage, FrontendMessage, RequestOutput, StepOutputs
from engine.sampling_params import SamplingParams
from engine.supervisor import Supervisor
from server.api.completion_choices import CompletionChoice
from server.api.completions import Completion
from server.app import create_app
from server.config import ServerConfig
from server.sse import EventTemplate

WARMUP_STEPS = 20
READ_PAUSE_S = 0.01


class OfflineClient(EngineClient):
    """An engine client whose engine accepts everything and says what `steps` holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Supervisor(EngineConfig(model=ModelConfig(model=str(folder)))))
        self._word_ids, vocab_size = word_ids_of(folder)
        self._draw = random.Random(0)
        self.request_ids: list[str] = []
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._become_ready(make_ready(str(folder), vocab_size))

    def _send(self, message: FrontendMessage) -> None:
        if isinstance(message, AddRequest):
            self.request_ids.append(message.request_id)
            self._dispatch(Accepted(message.request_id))

    def payloads(self, num_steps: int) -> list[bytes]:
        """The messages of steps that give every request a token."""
        return [
            msgspec.msgpack.encode(
                StepOutputs(
                    epoch=0,
                    outputs=[
                        RequestOutput(
                            request_id=request_id, first_token_index=step, token_ids=[self._draw.choice(self._word_ids)]
                        )
                        for request_id in self.request_ids
                    ],
                )
            )
            for step in range(num_steps)
        ]

    def take(self, payload: bytes) -> None:
        self._dispatch(self._decoder.decode(payload))
        self._deliver()


class NoTransport(asyncio.Transport):
    """Throws away what is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass


def drain(port: int, requests: Sequence[bytes], connected: Any) -> None:
    """Another process's main: sends the requests and throws away what comes back, until it is ended."""
    selector = selectors.DefaultSelector()
    for request in requests:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        selector.register(connection, selectors.EVENT_READ)
    connected.set()
    while True:
        for key, _ in selector.select():
            key.fileobj.recv(2**16)  # type: ignore[union-attr]
        time.sleep(READ_PAUSE_S)


def undisturbed(times: Sequence[float]) -> float:
    """The time that a quarter stays below: on a shared machine the others tell more of its other users."""
    return sorted(times)[len(times) // 4]


async def measure_steps(client: OfflineClient, num_steps: int, turn: Callable[[bytes], Awaitable[None]]) -> float:
    """Processor seconds a step."""
    payloads = client.payloads(WARMUP_STEPS + num_steps)
    gc.collect()
    times = []
    for payload in payloads:
        begin = time.process_time()
        await turn(payload)
        times.append(time.process_time() - begin)
    return undisturbed(times[WARMUP_STEPS:])


async def measure_pipeline(folder: Path, requests: Sequence[bytes], num_steps: int, *, with_sockets: bool) -> float:
    """Processor seconds a step of the whole application."""
    client = OfflineClient(folder)
    config = uvicorn.Config(
        create_app(client, ServerConfig(model=str(folder))), http="httptools", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False,
    )  # fmt: skip
    config.load()
    loop = asyncio.get_running_loop()

    state = ServerState()

    def make_protocol() -> Any:
        return config.http_protocol_class(config=config, server_state=state, app_state={}, _loop=loop)  # type: ignore[call-arg]

    context = multiprocessing.get_context("spawn")
    reader, protocols = None, []
    if with_sockets:
        connected = context.Event()
        server = await loop.create_server(make_protocol, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader = context.Process(target=drain, args=(port, list(requests), connected), daemon=True)
        reader.start()
    else:
        for request in requests:
            protocols.append(protocol := make_protocol())
            protocol.connection_made(NoTransport({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}))
            protocol.data_received(request)
    while client.num_open_streams < len(requests) or (reader is not None and not connected.is_set()):
        await asyncio.sleep(0.01)

    async def turn(payload: bytes) -> None:
        client.take(payload)
        for _ in range(3):  # the loop's flush of what was written, and tasks that were woken
            await asyncio.sleep(0)

    try:
        return await measure_steps(client, num_steps, turn)
    finally:
        if reader is not None:
            reader.kill()
        for protocol in protocols:
            protocol.connection_lost(None)
        while state.tasks:
            await asyncio.sleep(0.01)


async def measure_take(folder: Path, num_streams: int, num_steps: int) -> tuple[float, float]:
    """Processor seconds a step of decoding alone, and of decoding and detokenizing."""
    client = OfflineClient(folder)
    streams = [await client.generate([1, 2, 3], SamplingParams(max_tokens=2**20)) for _ in range(num_streams)]
    decoder = msgspec.msgpack.Decoder(EngineMessage)

    async def decode(payload: bytes) -> None:
        decoder.decode(payload)

    async def take(payload: bytes) -> None:
        client.take(payload)
        for stream in streams:
            stream._news.clear()

    return await measure_steps(client, num_steps, decode), await measure_steps(client, num_steps, take)


def measure_json(num_streams: int, num_steps: int) -> float:
    """Processor seconds a step of the JSON of its events."""
    choice = CompletionChoice(0, "", None, None)
    template = EventTemplate(msgspec.json.encode(Completion(id="cmpl-1", created=1, model="m", choices=[choice])), "text")
    texts = [f" {word}" for word in random.Random(0).choices(WORDS, k=num_streams)]
    times = []
    for _ in range(num_steps):
        begin = time.process_time()
        for text in texts:
            template.fill(text)
        times.append(time.process_time() - begin)
    return undisturbed(times)


def measure_parts(folder: Path, requests: Sequence[bytes], num_steps: int) -> dict[str, float]:
    """Part -> microseconds of processor time a token, one event a token, all streams in every step."""
    num_streams = len(requests)
    decode, take = uvloop.run(measure_take(folder, num_streams, num_steps))
    encode = measure_json(num_streams, num_steps)
    onto_nothing = uvloop.run(measure_pipeline(folder, requests, num_steps, with_sockets=False))
    onto_sockets = uvloop.run(measure_pipeline(folder, requests, num_steps, with_sockets=True))
    parts = {
        "msgpack decode": decode,
        "detokenize": take - decode,
        "JSON": encode,
        "tasks, SSE, ASGI, HTTP": onto_nothing - take - encode,
        "socket": onto_sockets - onto_nothing,
    }
    return {name: 1e6 * seconds / num_streams for name, seconds in parts.items()}
