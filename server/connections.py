"""ConnectionBound: how many connections a server has open at once. Each is a file, and the server needs some for itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger("octavo.server")

MOST_REFUSED = 32
WARN_INTERVAL_S = 60.0

Place = Literal["served", "refused", "dropped"]


class ConnectionBound:
    """most: connections that are served at once. Of those beyond, MOST_REFUSED at a time are told so, and others not even that,
    so that they are always few however many come. Those of TLS enter when their handshake is done, and may begin it where there
    would be room for them then. observe_refused: is told of each that is not served.
    """

    def __init__(self, most: int, observe_refused: Callable[[], None] = lambda: None) -> None:
        self.most = most
        self._observe_refused = observe_refused
        self._num: dict[Place, int] = {"served": 0, "refused": 0, "dropped": 0}
        self._warned_s = float("-inf")

    def enter(self) -> Place:
        """What becomes of a new connection; `leave` is called with it when the connection has ended."""
        place: Place = "dropped"
        if self._num["served"] < self.most:
            place = "served"
        elif self._num["refused"] < MOST_REFUSED:
            place = "refused"
        self._num[place] += 1
        if place != "served":
            self._observe_refused()
            self._warn()
        return place

    def may_shake_hands(self, num_begun: int) -> bool:
        """Whether a connection may begin its handshake, beside as many that have not done theirs; otherwise it is closed."""
        if self._num["served"] + self._num["refused"] + num_begun < self.most + MOST_REFUSED:
            return True
        self._observe_refused()
        self._warn()
        return False

    def leave(self, place: Place) -> None:
        self._num[place] -= 1

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned_s >= WARN_INTERVAL_S:
            self._warned_s = now
            logger.warning("%d connections are open: more are refused (--max-connections)", self.most)
