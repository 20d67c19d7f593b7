"""Clients that read slowly or not at all, on real sockets: generation does not wait, and who takes in nothing is let go of."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest
import uvloop

from engine.client import EngineClient
from engine.sampling_params import choice_seed
from server.app import create_server
from server.config import ServerConfig
from tests.crashes import make_model, running, text_of, until
from tests.fake_runner import expected_tokens
from tests.metrics_text import metric
from tests.server.fake_client import FakeEngineClient

SMALL = 4096  # of the system's buffers, so that a test need not send megabytes
WRITE_TIMEOUT_S = 1.0
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@asynccontextmanager
async def served(client: object, **settings: Any) -> AsyncIterator[int]:
    """The port of a server of this client."""
    config = ServerConfig(model="tiny", **{"write_timeout_s": WRITE_TIMEOUT_S, **settings})
    server = create_server(cast(EngineClient, client), config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            await until(lambda: server.started)
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 30)


class RawClient:
    """Sends a request, and reads as it is told."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self._socket.connect(("127.0.0.1", port))
        content = json.dumps(body).encode()
        self._socket.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(content)) + content
        )
        self._socket.setblocking(False)

    async def read(self, count: int) -> bytes:
        """At most so many bytes; nothing at the end, however that comes."""
        try:
            return await asyncio.get_running_loop().sock_recv(self._socket, count)
        except ConnectionResetError:
            return b""

    async def read_all(self) -> bytes:
        parts = []
        while part := await asyncio.wait_for(self.read(2**16), 60):
            parts.append(part)
        return b"".join(parts)

    async def read_until_done(self) -> bytes:
        """A whole stream."""
        got = b""
        while not got.endswith(END):
            part = await asyncio.wait_for(self.read(2**16), 60)
            assert part, "it was cut off"
            got += part
        return got

    def close(self) -> None:
        self._socket.close()


def talkative(num_tokens: int) -> FakeEngineClient:
    client = FakeEngineClient("x" * num_tokens)
    assert client.ready is not None
    client.ready = msgspec.structs.replace(client.ready, max_model_len=num_tokens + 10)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_takes_in_nothing_is_let_go_of(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        client = talkative(20_000)
        async with served(client) as port:
            body = {"prompt": "a", "max_tokens": 20_000, "stream": stream, "n": 1 if stream else 20}
            raw = RawClient(port, "/v1/completions", body)
            await until(lambda: "took in nothing for 1 s" in caplog.text)
            await until(lambda: client.streams[0].aborted)
            got = await raw.read_all()
            assert got.startswith(b"HTTP/1.1 200 OK") and not got.endswith((END, b"}"))
            raw.close()

    caplog.set_level("INFO")
    uvloop.run(scenario())


def test_a_slow_client_gets_everything() -> None:
    """It reads for several times the timeout, and never for long without a pause."""

    async def scenario() -> None:
        client = talkative(300)
        async with served(client) as port:
            raw = RawClient(port, "/v1/completions", {"prompt": "a", "max_tokens": 300, "stream": True})
            got, started = b"", asyncio.get_running_loop().time()
            while not got.endswith(END):
                part = await asyncio.wait_for(raw.read(1500), 60)
                assert part, "it was cut off"
                got += part
                if asyncio.get_running_loop().time() - started < 4 * WRITE_TIMEOUT_S:
                    await asyncio.sleep(0.2)
            assert got.count(b'"text":"x"') == 300
            raw.close()

    uvloop.run(scenario())


@pytest.mark.timeout(300)
def test_generation_does_not_wait_for_readers(tmp_path: Path) -> None:
    """What nobody reads runs to its end in the engine, other requests meanwhile too, and then all of it is there to read."""
    model = make_model(tmp_path / "model")

    async def scenario() -> None:
        async with running(model) as client, served(client, write_timeout_s=60.0) as port:
            body = {"prompt": [3, 4], "max_tokens": 380, "stream": True, "seed": 7}
            unread = [RawClient(port, "/v1/completions", {**body, "n": 2}) for _ in range(8)]
            await until(lambda: client.stats.generation_tokens >= 8 * 2 * 380 and client.stats.num_running == 0)
            assert client.stats.num_referenced_blocks == 0
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                response = await http.post("/v1/completions", json={**body, "stream": False})
            expected = [text_of(expected_tokens([3, 4], choice_seed(7, index), 380)) for index in range(2)]
            assert response.json()["choices"][0]["text"] == expected[0]
            for raw in unread:
                got = (await raw.read_until_done()).decode()
                events = [json.loads(line[6:]) for line in got.splitlines() if line.startswith("data: {")]
                for index in range(2):
                    text = "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)
                    assert text == expected[index]
                raw.close()

    uvloop.run(scenario())


@pytest.mark.timeout(600)
def test_many_vanished_clients_leave_nothing(tmp_path: Path, run_all: bool) -> None:
    """At every moment of a request's life: as soon as it is sent, queued, in its prompt, in the middle, nearly done."""
    model = make_model(tmp_path / "model", step_s=0.002)
    count = 1000 if run_all else 150

    async def vanish(port: int, number: int) -> None:
        body = {
            "prompt": [3 + number % 50] * (1 + number % 60),
            "max_tokens": 60,
            "stream": number % 3 > 0,
            "n": 1 + number % 2,
        }
        raw = RawClient(port, "/v1/completions", body)
        if number % 5:
            await asyncio.sleep(0.002 * (number % 83))
        if number % 4 == 0:
            await asyncio.wait({asyncio.ensure_future(raw.read(200))}, timeout=0.05)
        raw.close()

    async def scenario() -> None:
        settings = {"max_waiting_requests": 0, "max_waiting_tokens": 0}
        async with running(model) as client, served(client, **settings) as port:
            for first in range(0, count, 50):
                await asyncio.gather(*(vanish(port, first + i) for i in range(50)))
            stats = client.stats
            await until(lambda: client.num_open_streams == 0)
            await until(lambda: client.stats.num_running + client.stats.num_waiting + client.stats.num_referenced_blocks == 0)
            assert stats.num_blocks == 400
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                response = await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 3})
                assert response.status_code == 200
                metrics = (await http.get("/metrics")).text
            assert metric(metrics, "octavo_num_requests_running") == 0

    uvloop.run(scenario())
