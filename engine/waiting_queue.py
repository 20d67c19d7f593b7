"""The requests that wait to be admitted, those of lower `priority` first, within one priority in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from engine.request import Request, RequestStatus


class WaitingQueue:
    """Sets the status of what it takes in. Adding at the end is cheap where priorities do not differ, as they seldom do."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queue a request behind those of its priority."""
        request.status = RequestStatus.WAITING
        position = len(self._requests)
        while position and self._requests[position - 1].priority > request.priority:
            position -= 1
        self._requests.insert(position, request)

    def add_first(self, requests: Sequence[Request]) -> None:
        """Queue requests, in their order, before those of their priority: they had their turn already."""
        for request in reversed(requests):
            request.status = RequestStatus.WAITING
            position = 0
            while position < len(self._requests) and self._requests[position].priority < request.priority:
                position += 1
            self._requests.insert(position, request)

    def pop(self) -> Request:
        """Take the next request out."""
        return self._requests.popleft()

    def remove(self, request: Request) -> None:
        self._requests.remove(request)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)
