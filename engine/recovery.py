"""Recovery: what follows the death of an engine: whom it is blamed on, whether another one is worth starting, and its start."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from engine.config import EarlierLife, RecoveryConfig
from engine.errors import EngineUnavailable, OctavoError
from engine.lives import Lives
from engine.messages import EngineReady
from engine.open_requests import OpenRequests
from engine.supervisor import Death

logger = logging.getLogger(__name__)

OVERDUE_INTERVAL_S = 0.25


class Recovery:
    """lives: of the engines so far; who starts and leaves them tells it.

    start: an engine that takes over from an earlier one; raises OSError where files, processes or memory are wanting.
    is_wanted: whether requests still wait for it. fail: called with what ends the server.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        open_requests: OpenRequests,
        *,
        start: Callable[[EarlierLife], Awaitable[None]],
        is_wanted: Callable[[], bool],
        fail: Callable[[OctavoError], None],
    ) -> None:
        self._config = config
        self._open = open_requests
        self._start = start
        self._is_wanted = is_wanted
        self._fail = fail
        self._starting: asyncio.Task[None] | None = None
        self.lives = Lives()

    def count(self, death: Death, cause: str) -> bool:
        """Count a death; True where another engine is to be started, and then the requests that it is blamed on once too often
        have ended. cause: in words, with what the engine itself said."""
        self.lives.died(death)
        if death.is_final:
            self._fail(EngineUnavailable(cause))
            return False
        if self.lives.num_in_vain >= (most := self._config.max_failed_starts):
            sentence = f"the engine died {most} times in a row without completing a step; the last time {cause}"
            self._fail(EngineUnavailable(sentence))
            return False
        logger.error("%s; it is started again, with %d open requests", cause, len(self._open.streams))
        for request_id in self._open.blame(death.request_ids):
            logger.error("request %s is given up: the engine died over it again and again", request_id)
        return True

    def restart(self, ready: EngineReady) -> None:
        """Begin to start an engine like the first, of which `ready` tells; instead of one whose start is under way, if any."""
        self.lives.restart()
        for stream in self._open.streams.values():
            stream.engine_died()
        if self._starting is not None:
            self._starting.cancel()
        self._starting = asyncio.create_task(self._start_next(ready))

    async def _start_next(self, ready: EngineReady) -> None:
        """A want of files or memory passes, and is waited out. Until requests are taken again, deadlines are kept here."""
        earlier = EarlierLife(ready.num_blocks, ready.max_model_len, ready.free_device_bytes, ready.model_dir)
        is_started, since_s = False, time.monotonic()
        while self._is_wanted():
            try:
                if not is_started:
                    await self._start(earlier)
                    is_started = True
            except OSError as error:
                if time.monotonic() - since_s > self._config.restart_wait_s:
                    self._fail(EngineUnavailable(f"the engine process cannot be started again: {error}"))
            await asyncio.sleep(OVERDUE_INTERVAL_S)
            self._open.end_overdue()

    async def ended(self) -> None:
        """Wait until no start is under way: it goes on while an engine is wanted."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
