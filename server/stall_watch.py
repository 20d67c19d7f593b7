"""StallWatch: ends a connection whose client takes in nothing, and with it the request it is about.

Generation never waits for a reader, so such a client costs no one time; it costs memory and a place among the open requests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("octavo.server")

_LOOKS = 6  # per timeout
_BYTES_ACKED_AT = 120  # of tcpi_bytes_acked, 64 bits, in Linux's struct tcp_info since 4.1


class StallWatch:
    """timeout_s: for which a client may take in nothing while there is something for it. is_answering: whether more is to come.

    It looks a few times a timeout, and costs a stream nothing in between.
    """

    def __init__(self, transport: asyncio.Transport, timeout_s: float, is_answering: Callable[[], bool]) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._is_answering = is_answering
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0
        self._progress_s = 0.0

    def start(self) -> None:
        """Watch until the answer is given and sent; may be called again meanwhile."""
        if self._timer is None:
            self._progress_s = self._loop.time()
            self._look_later()

    def stop(self) -> None:
        """For good. The connection is let go of: it knows this watch, and would stay until a garbage collection."""
        self._is_answering = _never
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        num_waiting = self._transport.get_write_buffer_size()
        if num_waiting == 0 and not self._is_answering():
            return
        now = self._loop.time()
        taken = _bytes_taken(self._transport)
        if taken is None:
            taken = -num_waiting  # as far as can be told: we may have added as much as was taken
        if taken != self._taken or num_waiting == 0:
            self._taken, self._progress_s = taken, now
        if now - self._progress_s >= 0.99 * self._timeout_s:
            logger.info("a client took in nothing for %g s: its connection is ended", self._timeout_s)
            self._transport.abort()
            return
        self._look_later()


def _never() -> bool:
    return False


def _bytes_taken(transport: asyncio.Transport) -> int | None:
    """What the other side's system has acknowledged so far; None where ours does not say.

    What still waits in our own system's buffer would not do: a slow client empties that long before it takes more from us.
    """
    connection: Any = transport.get_extra_info("socket")
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED_AT + 8)
        return int(struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0])
    except (OSError, AttributeError, struct.error):
        return None
