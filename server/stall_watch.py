"""StallWatch: ends a connection whose client takes in nothing, and with it the request it is about.

Generation never waits for a reader, so such a client costs no one time; it costs memory and a place among the open requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import struct
import termios
from typing import Any

logger = logging.getLogger("octavo.server")

_LOOKS = 6  # per timeout


class StallWatch:
    """timeout_s: for which a client may take in nothing while there is something for it."""

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._num_waiting = 0
        self._progress_s = 0.0

    def start(self) -> None:
        """Watch until there is nothing more to send; may be called again meanwhile."""
        if self._timer is None:
            self._num_waiting = self._bytes_waiting()
            self._progress_s = self._loop.time()
            self._look_later()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s / _LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._transport.get_write_buffer_size() == 0:
            return
        num_waiting = self._bytes_waiting()
        if num_waiting != self._num_waiting:
            self._num_waiting, self._progress_s = num_waiting, self._loop.time()
        elif self._loop.time() - self._progress_s >= 0.99 * self._timeout_s:
            logger.info("a client took in nothing for %g s: its connection is ended", self._timeout_s)
            self._transport.abort()
            return
        self._look_later()

    def _bytes_waiting(self) -> int:
        """Ours and the system's: a slow client empties the latter long before it takes more from us."""
        return self._transport.get_write_buffer_size() + _bytes_in_system(self._transport)


def _bytes_in_system(transport: asyncio.Transport) -> int:
    """Of a socket, sent or not, but not yet acknowledged; 0 where the system does not say."""
    socket: Any = transport.get_extra_info("socket")
    try:
        return int(struct.unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError):
        return 0
