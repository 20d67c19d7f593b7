"""Server-sent events over sse-starlette: framing, and the end of what is left when a stream ends in whatever way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from server.disconnect import unless_disconnected
from server.errors import ClientDisconnected

DONE = b"data: [DONE]\n\n"
PING_INTERVAL_S = 15
_PING = ServerSentEvent(comment="waiting", sep="\n").encode()
"""A comment that keeps proxies from closing a quiet connection."""

_encode_text = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    """One event around JSON that is already encoded (so without line breaks)."""
    return b"data: " + data + b"\n\n"


class EventTemplate:
    """An event that differs from the last one in a single string: everything around it is encoded once a stream."""

    def __init__(self, data: bytes, field: str) -> None:
        """data: the JSON with an empty string in `field`, the last field of that name."""
        self._head, mark, self._tail = event(data).rpartition(f'"{field}":""'.encode())
        assert mark, f"{field} is not empty"
        self._head += mark[:-2]

    def fill(self, text: str) -> bytes:
        return self._head + _encode_text(text) + self._tail


class EventStream(EventSourceResponse):
    """Streams events that are already bytes, and calls `on_close` exactly once when the response is over.

    `on_close` is here besides the generator's own `finally` because a generator that never started has none to run: the client
    may be gone before the first event.

    The library's own loop costs several tasks a stream, and a cancel scope and a lock an event; this one has a task that waits
    for the disconnect and a timer for the pings.
    """

    def __init__(
        self, content: AsyncGenerator[bytes, None], *, headers: Mapping[str, str], on_close: Callable[[], None]
    ) -> None:
        super().__init__(content, headers=headers)
        self._content = content
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send))
        except ClientDisconnected:
            pass
        finally:
            self._on_close()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = _Pings(send)
        try:
            async with aclosing(self._content):
                async for chunk in self._content:
                    pings.is_quiet = False
                    await send(_body(chunk))
        finally:
            pings.stop()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Pings:
    """Sends a comment whenever nothing was sent for a whole interval. `is_quiet`: to be cleared with every event."""

    def __init__(self, send: Send) -> None:
        self.is_quiet = True
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(PING_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        # The client of a ping that still waits for its turn reads nothing: another one would only wait behind it.
        if self.is_quiet and (self._task is None or self._task.done()):
            self._task = self._loop.create_task(self._ping())
        self.is_quiet = True
        self._timer = self._loop.call_later(PING_INTERVAL_S, self._tick)

    async def _ping(self) -> None:
        await self._send(_body(_PING))

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


def _body(chunk: bytes) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
