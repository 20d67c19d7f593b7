"""A tiny OpenAI-like server: a prompt of w words has w + 3 tokens, an answer max_tokens chunks."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class FakeServer:
    """Listens on a free port of 127.0.0.1. Streams are numbered by arrival.

    broken: those that get a 500. hang_after: from that one on, none is answered. delay_s: before each. unknown_field: a 400.
    """

    def __init__(
        self,
        broken: frozenset[int] = frozenset(),
        *,
        hang_after: int | None = None,
        delay_s: float = 0.0,
        unknown_field: str = "",
    ) -> None:
        self.broken = broken
        self.hang_after = hang_after
        self.delay_s = delay_s
        self.unknown_field = unknown_field
        self.num_streams = 0
        self.num_open = 0
        self.most_open = 0
        self.bodies: list[dict[str, Any]] = []

    async def __aenter__(self) -> FakeServer:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0
                )
                body = json.loads(await reader.readexactly(length)) if length else {}
                await self.answer(head.split()[1], body, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async def answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            return self.send(writer, 200, {"data": [{"id": "fake"}]})
        if self.unknown_field in body:
            return self.send(writer, 400, {"error": {"message": f"Unrecognized request argument: {self.unknown_field}"}})
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        usage = {"prompt_tokens": len(text.split()) + 3, "completion_tokens": body["max_tokens"]}
        if not body.get("stream"):
            return self.send(writer, 200, {"usage": usage})
        self.bodies.append(body)
        self.num_streams += 1
        if self.num_streams - 1 in self.broken:
            return self.send(writer, 500, {"error": {"message": "broken on purpose"}})
        if self.hang_after is not None and self.num_streams > self.hang_after:
            await asyncio.Event().wait()
        await asyncio.sleep(self.delay_s)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await self.stream(body, usage, writer)
        self.num_open -= 1
        return None

    def send(self, writer: asyncio.StreamWriter, status: int, payload: dict[str, Any]) -> None:
        data = json.dumps(payload).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def stream(self, body: dict[str, Any], usage: dict[str, int], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        is_chat = "messages" in body
        choices = [{"delta": {"role": "assistant"}} if is_chat else {"text": ""}]
        choices += [{"delta": {"content": "a"}} if is_chat else {"text": "a"}] * body["max_tokens"]
        events = [json.dumps({"choices": [choice]}) for choice in choices]
        events += [json.dumps({"choices": [], "usage": usage}), "[DONE]"]
        for event in events:
            data = f": a comment\r\ndata: {event}\r\n\r\n".encode()
            for part in (data[:9], data[9:]):  # events need not come in one piece
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
