"""Deadlines: which requests have run out of time. While none has, looking costs one comparison."""

from __future__ import annotations

import heapq
import time
from collections.abc import Container
from typing import NamedTuple

from engine.errors import DeadlineExceeded
from engine.messages import AddRequest

FIRST_TOKEN, WHOLE = "first_token_timeout", "timeout"
"""The two kinds, by the names of the fields that set them."""


class _Deadline(NamedTuple):
    at_s: float
    request_id: str
    kind: str


class Deadlines:
    """Times of time.monotonic(), the nearest first. Those of requests that have ended stay until they are due, or until
    there are many of them."""

    MANY = 256

    def __init__(self) -> None:
        self._heap: list[_Deadline] = []

    def add(self, request_id: str, kind: str, at_s: float) -> None:
        heapq.heappush(self._heap, _Deadline(at_s, request_id, kind))

    def forget_ended(self, open_ids: Container[str], num_open: int) -> None:
        """Drop the deadlines of requests that are not among `open_ids`, once they are most of them."""
        if len(self._heap) > self.MANY + 4 * num_open:
            self._heap = [deadline for deadline in self._heap if deadline.request_id in open_ids]
            heapq.heapify(self._heap)

    def take_passed(self) -> list[tuple[str, str]]:
        """(request id, kind) of those that have passed, each told once."""
        if not self._heap or self._heap[0].at_s > (now := time.monotonic()):
            return []
        passed = []
        while self._heap and self._heap[0].at_s <= now:
            _, request_id, kind = heapq.heappop(self._heap)
            passed.append((request_id, kind))
        return passed

    def __len__(self) -> int:
        return len(self._heap)


def deadline_exceeded(kind: str, since: str) -> DeadlineExceeded:
    """since: what the time went into, to end the sentence."""
    what = "without a first token" if kind == FIRST_TOKEN else "before the request was done"
    return DeadlineExceeded(f"the time limit ({kind}) passed {what}: {since}", param=kind)


def overdue(message: AddRequest) -> DeadlineExceeded | None:
    """Why a request that waits for its grammar is to be given up; None while it has time."""
    now = time.monotonic()
    for kind, at_s in ((FIRST_TOKEN, message.first_token_deadline_s), (WHOLE, message.deadline_s)):
        if at_s is not None and at_s <= now:
            return deadline_exceeded(kind, "its grammar was still being compiled")
    return None
