"""Lives: how the engines of one server did, one after the other, and whether another one is worth starting."""

from __future__ import annotations

import time

from engine.supervisor import Death

# An engine that dies idle so soon after it was ready gets nowhere, though its first step succeeded.
SHORT_LIFE_S = 10.0


class Lives:
    """num_restarts: engines that took a dead one's place. num_in_vain: of the last ones, those in a row that got nowhere."""

    def __init__(self) -> None:
        self.num_restarts = 0
        self.num_in_vain = 0
        self._started_s = self._ready_s = self._ended_s = time.monotonic()
        self._start_took_s = 0.0
        self._was_ready = False

    def ready(self) -> None:
        """The present engine takes requests."""
        self._ready_s = time.monotonic()
        self._start_took_s = self._ready_s - self._started_s
        self._was_ready = True

    def left(self) -> None:
        """It takes no more: it has died, or is about to be killed."""
        self._ended_s = time.monotonic()

    def died(self, death: Death) -> None:
        """A life was in vain where it ended before a step, or soon after its first with nobody to blame for it."""
        num_probes = 1 if self.num_restarts else 0
        got_on = death.num_completed > num_probes or death.request_ids or self._ended_s - self._ready_s > SHORT_LIFE_S
        self.num_in_vain = 0 if self._was_ready and got_on else self.num_in_vain + 1
        self._was_ready = False

    def restart(self) -> None:
        """Another engine is started."""
        self.num_restarts += 1
        self._started_s = time.monotonic()

    @property
    def since_death_s(self) -> float:
        """Since requests were last taken."""
        return time.monotonic() - self._ended_s

    @property
    def ready_in_s(self) -> float:
        """When the engine that is being started should be ready, if it takes as long as the one before; at least a second."""
        return max(1.0, self._started_s + self._start_took_s - time.monotonic())
