"""Drain: how a server ends. First it stops being ready, then it takes no new work, and when what is open is done it goes."""

from __future__ import annotations

import asyncio


class Drain:
    """How far the end has come. has_begun: the server says that it is not ready. is_closed: it takes no new work."""

    def __init__(self) -> None:
        self.has_begun = False
        self.is_closed = False
        self._num_open = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def begin(self) -> None:
        """From now on the server is not ready, but takes work from those who have not heard of it yet."""
        self.has_begun = True

    def close(self) -> None:
        """From now on new work is refused."""
        self.has_begun = self.is_closed = True

    async def wait_until_idle(self) -> None:
        """Until no work is open; what comes in before `close` is waited for too."""
        await self._is_idle.wait()

    def opened(self) -> None:
        self._num_open += 1
        self._is_idle.clear()

    def ended(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._is_idle.set()
