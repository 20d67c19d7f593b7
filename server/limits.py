"""uvicorn's HTTP protocol with bounds: on what a request may bring before anybody looks at it, and on how long that may take.

The parser collects a header, a trailer or a chunk's extension until it is whole, and waits for the rest of a message forever;
here neither goes on without end, nor does waiting for a client that takes in nothing of its answer. What is refused below the
application is told in OpenAI's shape too, and ends the connection. So is a connection too many, of which nothing is read.
"""

from __future__ import annotations

import asyncio
import functools
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.connections import ConnectionBound, Place
from server.errors import error_body
from server.stall_watch import StallWatch
from server.tls import has_sent_all

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 100
# What a body must bring in a second beyond the time that every message has.
MIN_BODY_BYTES_PER_S = 64 * 1024
# A client that is refused early (401, 413) may send the rest, so that it comes to read the answer; but not any number of bytes.
DISCARDED_BODIES = 2
# Closing at once while a client sends would reset the connection, and the answer could be lost on its way.
LINGER_S = 2.0
LINGER_BYTES = 16 * 2**20
FAREWELL_S = 0.5

_REFUSALS = {
    400: ("This is no HTTP request that can be understood.", "bad_http"),
    408: ("The request did not arrive in time.", "request_timeout"),
    413: ("The body is more than this server reads.", "body_too_large"),
    414: (f"The URL is longer than {MAX_URL_BYTES:,} bytes.", "url_too_long"),
    431: (f"The headers are more than {MAX_HEADERS}, or longer than {MAX_HEADER_BYTES:,} bytes in all.", "headers_too_large"),
    503: ("This server has as many connections as it takes.", "too_many_connections"),
}


class _Refused(Exception):
    """Ends the parsing; `status` says why."""


class LimitedProtocol(HttpToolsProtocol):
    """read_timeout_s: from a message's first byte (or the connection's begin) to its last header, and then, with a second more
    for every MIN_BODY_BYTES_PER_S of its body, to its end. Time in which the server itself does not read is not counted.
    write_timeout_s: for which a client may take in nothing of an answer. bound: of the connections; one for all of them.
    """

    def __init__(
        self,
        *args: Any,
        read_timeout_s: float,
        write_timeout_s: float,
        max_body_bytes: int,
        bound: ConnectionBound,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._bound = bound
        self._place: Place | None = None
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._max_discarded_bytes = DISCARDED_BODIES * max_body_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since = 0.0
        self._has_bytes = False
        self._refusal = 400
        self._num_headers = 0
        self._header_bytes = 0
        self._body_bytes = 0
        self._silent_bytes = 0
        self._lingered_bytes: int | None = None  # None: the connection is open

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._stall_watch = StallWatch(transport, self._write_timeout_s, self._is_answering)
        self._place = self._bound.enter()
        if self._place == "served":
            self._wait()
        elif self._place == "refused":
            self._refuse(503)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stall_watch.stop()
        if self._place is not None:
            self._bound.leave(self._place)
            self._place = None
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self._wait_for_farewell()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_farewell()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._wait_for_farewell()

    def _close(self) -> None:
        self.transport.close()
        self._wait_for_farewell()

    def _wait_for_farewell(self) -> None:
        """TLS ends with a word from both sides. A client that keeps a connection for later use says none, and the library would
        wait for half a minute, as would the server for its own end."""
        if self.scheme == "https" and self.transport.is_closing():
            self._stop_waiting()
            self._timer = self.loop.call_later(FAREWELL_S, self._end_without_farewell)

    def _end_without_farewell(self) -> None:
        self._timer = None
        if has_sent_all(self.transport):
            self.transport.abort()
        else:
            self._wait_for_farewell()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._lingered_bytes is not None:
            self._lingered_bytes += len(data)
            if self._lingered_bytes > LINGER_BYTES:
                self._close()
            return
        self._has_bytes = True
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        self._silent_bytes += len(data)
        super().data_received(data)
        if self._silent_bytes > MAX_HEADER_BYTES and self._lingered_bytes is None:
            self._refuse(431)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser gives up, which is also how this class stops it."""
        self._refuse(self._refusal)

    def on_message_begin(self) -> None:
        self._num_headers = self._header_bytes = self._body_bytes = self._silent_bytes = 0
        if self._timer is None:
            self._wait()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop_parsing(414)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._silent_bytes = 0
        self._num_headers += 1
        self._header_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._stop_parsing(431)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()
        self._stall_watch.start()
        self._wait()

    def on_chunk_header(self) -> None:
        self._silent_bytes = 0

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        self._body_bytes += len(body)
        if self._body_bytes > self._max_discarded_bytes:
            self._stop_parsing(413)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        self._stop_waiting()
        self._has_bytes = False
        super().on_message_complete()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._waiting_since = self.loop.time()
        self._timer = self.loop.call_later(self._read_timeout_s, self._on_timer)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        if self.flow.read_paused:
            self._wait()
            return
        allowed_s = self._read_timeout_s + self._body_bytes / MIN_BODY_BYTES_PER_S
        left_s = self._waiting_since + allowed_s - self.loop.time()
        if left_s > 0.01:
            self._timer = self.loop.call_later(left_s, self._on_timer)
        elif self._has_bytes:
            self._refuse(408)
        else:
            self._close()

    def _stop_parsing(self, status: int) -> None:
        self._refusal = status
        raise _Refused(status)

    def _refuse(self, status: int) -> None:
        """Answers, unless another answer is on its way, and ends the connection."""
        self._stop_waiting()
        cycle = self.cycle
        has_begun = self._is_answering() and cycle.response_started
        if self.transport.is_closing() or has_begun or self.pipeline:
            self._close()
            return
        message, code = _REFUSALS[status]
        kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
        self.transport.write(_refusal(status, error_body(message, kind, code=code)))
        if cycle is not None:
            cycle.disconnected = True
            cycle.waiting_for_100_continue = False
            cycle.message_event.set()
        self._lingered_bytes = 0
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_S, self._close)
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _refusal(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head += "Retry-After: 1\r\n" if status == 503 else ""
    return head.encode() + b"X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n" + body


def limited_protocol(
    *,
    read_timeout_s: float,
    write_timeout_s: float,
    max_body_bytes: int,
    bound: ConnectionBound,
) -> Any:
    """LimitedProtocol for uvicorn, which makes one for every connection."""
    return functools.partial(
        LimitedProtocol,
        read_timeout_s=read_timeout_s,
        write_timeout_s=write_timeout_s,
        max_body_bytes=max_body_bytes,
        bound=bound,
    )
