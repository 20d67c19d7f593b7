"""The application behind uvicorn on a port of this machine, in the test's own event loop, and bytes to and from it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import uvicorn

from engine.client import EngineClient
from server.app import create_server
from server.config import ServerConfig
from tests.server.fake_client import FakeEngineClient

LIMIT_S = 60.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, which must be one."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert self.headers["content-type"] == "application/json" and int(self.headers["content-length"]) == len(self.body)
        return error


@asynccontextmanager
async def served(client: FakeEngineClient | None = None, **settings: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """The server, and the port it listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = ServerConfig(model="tiny", **settings)
        server = create_server(cast(EngineClient, client or FakeEngineClient()), config)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield server, sock.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, LIMIT_S)


async def talk(port: int, *parts: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Sends the parts, and gives all that comes back until the server ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), LIMIT_S)
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def ask(port: int, *parts: bytes, tls: ssl.SSLContext | None = None) -> Answer:
    """The same for one answer, its body by Content-Length."""
    head, _, body = (await talk(port, *parts, tls=tls)).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)
