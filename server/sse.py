"""Server-sent events over sse-starlette: framing, and the end of what is left when a stream ends in whatever way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING_INTERVAL_S = 15


def event(data: bytes) -> bytes:
    """One event around JSON that is already encoded (so without line breaks)."""
    return b"data: " + data + b"\n\n"


class EventStream(EventSourceResponse):
    """Streams events that are already bytes, and calls `on_close` exactly once when the response is over.

    `on_close` is here besides the generator's own `finally` because a generator that never started has none to run: the client
    may be gone before the first event.
    """

    def __init__(self, content: AsyncIterator[bytes], *, headers: Mapping[str, str], on_close: Callable[[], None]) -> None:
        super().__init__(content, headers=headers, ping=PING_INTERVAL_S, sep="\n", ping_message_factory=_ping)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def _ping() -> ServerSentEvent:
    """A comment that keeps proxies from closing a quiet connection."""
    return ServerSentEvent(comment="waiting", sep="\n")
