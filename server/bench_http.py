"""A small HTTP/1.1 client over asyncio, for the load generator: little time between a chunk's arrival and its time stamp."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit


class HttpError(Exception):
    """The server's answer is no answer to our question."""


class Connections:
    """Keep-alive connections to one server, opened as needed. Raises HttpError for a URL that is none."""

    def __init__(self, base_url: str, api_key: str = "") -> None:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError:
            raise HttpError("no URL; it must look like http://127.0.0.1:8000") from None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise HttpError("no URL; it must look like http://127.0.0.1:8000")
        self.host = url.hostname
        self.tls = url.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.path = url.path.rstrip("/").removesuffix("/v1")
        self.head = f"Host: {url.netloc}\r\nAccept: */*\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self.idle:
            reader, writer = self.idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self.host, self.port, ssl=self.tls or None, limit=2**20)

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


class Response:
    """Sends one request and yields the body as it arrives; use as `async with`."""

    def __init__(self, connections: Connections, method: str, path: str, payload: dict[str, Any] | None = None) -> None:
        self.connections = connections
        body = json.dumps(payload).encode() if payload is not None else b""
        head = f"{method} {connections.path}{path} HTTP/1.1\r\n{connections.head}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.request = f"{head}\r\n".encode() + body
        self.headers: dict[str, str] = {}
        self.status = 0
        self.finished = False

    async def __aenter__(self) -> Response:
        was_idle = bool(self.connections.idle)
        self.reader, self.writer = await self.connections.open()
        try:
            head = await self.read_head()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if not was_idle or (isinstance(error, asyncio.IncompleteReadError) and error.partial):
                raise
            # The server closed a kept connection just when we took it: ask again on a new one, as every HTTP client does.
            self.connections.close()
            self.reader, self.writer = await self.connections.open()
            head = await self.read_head()
        self.status = int(head[0].split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return self

    async def read_head(self) -> list[str]:
        """Sends the request; the lines of the answer's head."""
        try:
            self.writer.write(self.request)
            return (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        except BaseException:
            self.writer.close()
            raise

    async def __aexit__(self, *exc: object) -> None:
        if self.finished and self.headers.get("connection", "").lower() != "close":
            self.connections.idle.append((self.reader, self.writer))
        else:
            self.writer.close()

    async def read_part(self) -> bytes:
        """The next piece of the body; empty at its end."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            size = int((await self.reader.readline()).split(b";")[0], 16)
            data = (await self.reader.readexactly(size + 2))[:-2]
            self.finished = size == 0
            return data
        if "content-length" in self.headers:
            data = b"" if self.finished else await self.reader.readexactly(int(self.headers["content-length"]))
            self.finished = True
            return data
        return await self.reader.read(2**16)

    async def read_all(self) -> bytes:
        body = b""
        while part := await self.read_part():
            body += part
        return body


async def call(connections: Connections, method: str, path: str, payload: dict[str, Any] | None = None) -> Any:
    async with Response(connections, method, path, payload) as response:
        body = await response.read_all()
    if response.status != 200:
        raise HttpError(f"{method} {path}: HTTP {response.status} {body[:300].decode(errors='replace')}")
    return json.loads(body)
