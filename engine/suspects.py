"""Suspects: which requests were in the steps that an engine died in, and how often since they last got on."""

from __future__ import annotations

from collections.abc import Container, Iterable

RUNS_ALONE_AT = 2
FAILS_AT = 3


class Suspects:
    """A death counts against the requests of its steps, and a token of its own clears a request.

    One that brings the engine down again and again is told from those that were only there: at RUNS_ALONE_AT deaths it runs by
    itself, where the next one is its own, and at FAILS_AT it is given up.
    """

    def __init__(self) -> None:
        self._num_deaths: dict[str, int] = {}

    def __bool__(self) -> bool:
        """Whether there are any: cheap enough to ask for every message."""
        return bool(self._num_deaths)

    def blame(self, request_ids: Iterable[str], still_open: Container[str]) -> list[str]:
        """Count a death; returns the requests that are given up, and forgets those that are no longer open."""
        self._num_deaths = {request_id: n for request_id, n in self._num_deaths.items() if request_id in still_open}
        for request_id in request_ids:
            if request_id in still_open:
                self._num_deaths[request_id] = self._num_deaths.get(request_id, 0) + 1
        return [request_id for request_id, n in self._num_deaths.items() if n >= FAILS_AT]

    def runs_alone(self, request_id: str) -> bool:
        return self._num_deaths.get(request_id, 0) >= RUNS_ALONE_AT

    def clear(self, request_id: str) -> None:
        """It has had a token."""
        self._num_deaths.pop(request_id, None)
