"""The requests that wait to be admitted, in the order of their ranks: by arrival, and by `priority` with ageing."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

from engine.request import Request, RequestStatus

LEVEL_S = 10.0
"""A waiting request's priority number falls by one in this time."""

MAX_LEVELS = 360
"""Numbers further from 0 count as this one, so that nobody waits for more than an hour behind those that came later."""


def rank(arrival_time_s: float, priority: int) -> float:
    """A request's place in the queue, the lowest first.

    All priority numbers fall alike with time, so that the order of two requests is settled once both are there: that of
    arrival + priority * LEVEL_S. Equal priorities are served in order of arrival; of others the higher number goes first
    where it has waited LEVEL_S longer for each step between them. The queue need never be sorted again, and none starves.
    """
    return arrival_time_s + LEVEL_S * max(-MAX_LEVELS, min(priority, MAX_LEVELS))


class WaitingQueue:
    """Sets the status of what it takes in. Adding at the end is cheap where priorities do not differ, as they seldom do."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queue a request behind those of its rank."""
        request.status = RequestStatus.WAITING
        position = len(self._requests)
        while position and self._requests[position - 1].rank > request.rank:
            position -= 1
        self._requests.insert(position, request)

    def add_first(self, requests: Sequence[Request]) -> None:
        """Queue requests, in their order, before those of their rank: they had their turn already."""
        for request in reversed(requests):
            request.status = RequestStatus.WAITING
            position = 0
            while position < len(self._requests) and self._requests[position].rank < request.rank:
                position += 1
            self._requests.insert(position, request)

    def pop(self) -> Request:
        """Take the next request out."""
        return self._requests.popleft()

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def oldest_wait_s(self, begun: Sequence[Request]) -> float:
        """How long the prompt that came first has been waiting, of those that are begun and the next in the queue."""
        if not begun and not self._requests:
            return 0.0  # most steps
        prompts = [request for request in (*begun, *itertools.islice(self, 1)) if request.num_output_tokens == 0]
        return time.monotonic() - min(request.arrival_time_s for request in prompts) if prompts else 0.0

    def check_integrity(self) -> None:
        """Raise AssertionError unless those in the queue are as it says, and in its order."""
        assert all(request.status is RequestStatus.WAITING for request in self)
        assert sorted(self, key=lambda request: request.rank) == list(self), "the queue is out of order"

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)
