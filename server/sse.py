"""Server-sent events over sse-starlette: framing, and the end of what is left when a stream ends in whatever way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from server.disconnect import unless_disconnected
from server.errors import ClientDisconnected
from server.request_log import SEND_BODY

DONE = b"data: [DONE]\n\n"
PING_INTERVAL_S = 5
_PING = ServerSentEvent(comment="waiting", sep="\n").encode()
"""A comment that keeps proxies from closing a quiet connection."""

_encode_text = msgspec.json.Encoder().encode


def event(data: bytes, name: str | None = None) -> bytes:
    """One event around JSON that is already encoded (so without line breaks). name: its type, for clients that go by types."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + data + b"\n\n"


class EventTemplate:
    """An event that differs from the last one in a single string: everything around it is encoded once a stream."""

    def __init__(self, data: bytes, field: str) -> None:
        """data: the JSON with an empty string in `field`, the last field of that name."""
        self._head, mark, self._tail = event(data).rpartition(f'"{field}":""'.encode())
        assert mark, f"{field} is not empty"
        self._head += mark[:-2]

    def fill(self, text: str) -> bytes:
        return self._head + _encode_text(text) + self._tail


class EventSource(Protocol):
    """An answer on its way to being streamed."""

    def events(self) -> AsyncGenerator[bytes, None]:
        """All of it, event by event; it may be left at any time."""
        ...

    def set_shortcut(self, send: Callable[[bytes], Awaitable[None] | None]) -> None:
        """Give events to `send` instead, while whoever reads `events` waits for the next one and it is not the last.

        It returns what the reader then has to await first, or None.
        """
        ...

    def close(self) -> None:
        """Let go of everything. May be called again."""
        ...


class EventStream(EventSourceResponse):
    """Streams the events of a source, and closes it when the response is over, however it ends.

    That is here besides the generator's own `finally` because a generator that never started has none to run: the client may be
    gone before the first event.

    The library's own loop costs several tasks a stream, and a cancel scope and a lock an event. Here a stream has one task, and
    one that waits for the disconnect. An event of a stream that keeps up wakes neither: it is sent from where it came up, as
    far as that can be done at once, and only a send that has to wait for the client is left to the stream's task.
    """

    def __init__(self, source: EventSource, *, headers: Mapping[str, str]) -> None:
        self._source = source
        self._events = source.events()
        super().__init__(self._events, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send, scope.get(SEND_BODY, send)))
        except ClientDisconnected:
            pass
        finally:
            self._source.close()

    async def _stream(self, send: Send, send_body: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = _Body(send_body)
        self._source.set_shortcut(body.push)
        try:
            async with aclosing(self._events):
                async for chunk in self._events:
                    await body.send(chunk)
        finally:
            body.stop_pings()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Body:
    """Sends parts of the body, one at a time, and a comment whenever there was none for a whole interval."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_quiet = True
        self._is_sending = False
        self._loop = asyncio.get_running_loop()
        self._ping: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(PING_INTERVAL_S, self._tick)

    async def send(self, chunk: bytes) -> None:
        if self._ping is not None:
            await asyncio.wait({self._ping})
        self._is_sending = True
        await self._send_chunk(chunk)
        self._is_sending = False

    def push(self, chunk: bytes) -> Awaitable[None] | None:
        """Send as far as that goes at once: None where that is all of it, else the rest, to be awaited by a task."""
        work = self._send_chunk(chunk) if self._ping is None else self.send(chunk)
        steps = work.__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return None
        self._is_sending = True
        return _Rest(steps, waits_for, self._end_push)

    def _end_push(self) -> None:
        self._is_sending = False

    def _send_chunk(self, chunk: bytes) -> Awaitable[None]:
        self._is_quiet = False
        return self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    def _tick(self) -> None:
        # A client that takes nothing in needs no comments.
        if self._is_quiet and not self._is_sending and self._ping is None:
            self._ping = self._loop.create_task(self._send_ping())
        self._is_quiet = True
        self._timer = self._loop.call_later(PING_INTERVAL_S, self._tick)

    async def _send_ping(self) -> None:
        await self._send({"type": "http.response.body", "body": _PING, "more_body": True})
        self._ping = None

    def stop_pings(self) -> None:
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()


class _Rest:
    """Work from its first wait on. `waits_for`: what it has asked its task, which it did not have yet, to wait for."""

    def __init__(self, steps: Generator[Any, Any, None], waits_for: Any, on_end: Callable[[], None]) -> None:
        self._steps = steps
        self._waits_for = waits_for
        self._on_end = on_end

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    result = yield waits_for
                except BaseException as error:
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = self._steps.send(result)
        except StopIteration:
            self._on_end()
