"""Long texts are tokenized in threads, so that the event loop is not held up; few at a time, and not any number."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.errors import TooManyRequests

# A text longer than this goes to a thread (a shorter one takes about 2 ms on the loop).
LONG_TEXT_CHARS = 8192
# The tokenizers let go of the interpreter's lock, so more threads would take the engine's cores.
NUM_THREADS = 2
# Two of the largest bodies, some ten seconds of work a thread.
MAX_PENDING_CHARS = 128 * 2**20

Result = TypeVar("Result")


class TextThreads:
    """Work on long texts, each with its number of characters. pending_chars: of what waits or is being worked on."""

    def __init__(self, num_threads: int = NUM_THREADS, max_pending_chars: int = MAX_PENDING_CHARS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "long-texts")
        self._max_pending_chars = max_pending_chars
        self._lock = threading.Lock()
        self.pending_chars = 0

    async def run(self, num_chars: int, function: Callable[[], Result]) -> Result:
        """The function's result, from a thread; one text alone may be of any length. Raises TooManyRequests.

        Given up by its caller, it leaves the queue at once; work that has begun goes on, and counts until it is done.
        """
        if self.pending_chars and self.pending_chars + num_chars > self._max_pending_chars:
            raise TooManyRequests("As much text waits to be tokenized as this server takes; try again soon.")
        self._count(num_chars)
        work = self._threads.submit(function)
        work.add_done_callback(lambda _: self._count(-num_chars))
        return await asyncio.wrap_future(work)

    def _count(self, num_chars: int) -> None:
        with self._lock:  # work is done in its thread, and begun on the loop
            self.pending_chars += num_chars


_text_threads = TextThreads()


async def in_thread_if_long(num_chars: int, function: Callable[[], Result]) -> Result:
    """The function's result; work on a long text is done in a thread. Raises TooManyRequests."""
    return await _text_threads.run(num_chars, function) if num_chars > LONG_TEXT_CHARS else function()
