"""Deadlines: which requests have run out of time. While none has, looking costs one comparison."""

from __future__ import annotations

import heapq
import time
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine.errors import DeadlineExceeded
from engine.messages import AddRequest

if TYPE_CHECKING:  # it brings numpy, for which a frontend would wait at its start
    from engine.request import Request

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

    def add_request(self, choices: Sequence[Request], unfinished: Mapping[str, Sequence[Request]]) -> None:
        """What the choices of one request say of its time. unfinished: see `take_overdue`."""
        first = choices[0]
        if first.deadline_s is not None:
            self.add(first.request_id, WHOLE, first.deadline_s)
        if first.first_token_deadline_s is not None and not _has_output(choices):
            self.add(first.request_id, FIRST_TOKEN, first.first_token_deadline_s)
        self.forget_ended(unfinished, len(unfinished))

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

    def take_overdue(self, unfinished: Mapping[str, Sequence[Request]]) -> list[tuple[Request, DeadlineExceeded]]:
        """A choice of each request whose time is up, and why it is to end. unfinished: by request id, the choices that have not
        ended."""
        passed = self.take_passed()
        if not passed:
            return []
        late: dict[str, tuple[Request, DeadlineExceeded]] = {}
        for request_id, kind in passed:
            choices = unfinished.get(request_id)
            if not choices or request_id in late or (kind == FIRST_TOKEN and _has_output(choices)):
                continue
            num_tokens = sum(choice.num_output_tokens for choice in choices)
            since = f"{time.monotonic() - choices[0].arrival_time_s:.1f} s in the engine, {num_tokens} tokens"
            late[request_id] = choices[0], deadline_exceeded(kind, since)
        return list(late.values())

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


def _has_output(choices: Sequence[Request]) -> bool:
    """Whether a request, of which these choices have not ended, has had its first token."""
    return len(choices) < choices[0].sampling.n or any(choice.num_output_tokens for choice in choices)
