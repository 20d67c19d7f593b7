"""OpenRequests: the streams of one frontend and the answers that are still awaited, whichever engine is at work on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from engine.deadlines import deadline_exceeded
from engine.errors import OctavoError, RequestFailed
from engine.request_stream import RequestStream
from engine.suspects import FAILS_AT, Suspects


class OpenRequests:
    """streams: by request id, in the order in which they came; an entry goes when its stream has ended."""

    def __init__(self) -> None:
        self.streams: dict[str, RequestStream] = {}
        self.suspects = Suspects()
        self._answers: dict[str, asyncio.Future[None]] = {}

    def open(self, stream: RequestStream) -> asyncio.Future[None]:
        """Returns what tells whether the engine has accepted it; `answered` lets go of that."""
        answer = asyncio.get_running_loop().create_future()
        self.streams[stream.request_id] = stream
        self._answers[stream.request_id] = answer
        return answer

    def answered(self, request_id: str) -> None:
        del self._answers[request_id]

    def accept(self, request_id: str) -> None:
        answer = self._answers.get(request_id)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def is_awaited(self, request_id: str) -> bool:
        """Whether nobody knows yet if the engine takes this request."""
        answer = self._answers.get(request_id)
        return answer is not None and not answer.done()

    def fail(self, request_id: str, error: OctavoError) -> None:
        """End a request with an error, whether it has been accepted or not."""
        stream = self.streams.pop(request_id, None)
        answer = self._answers.get(request_id)
        if answer is not None and not answer.done():
            answer.set_exception(error)
        elif stream is not None:
            stream.fail(error)
            stream.deliver()

    def fail_all(self, error: OctavoError) -> None:
        for request_id in list(self.streams):
            self.fail(request_id, error)

    def end_overdue(self) -> None:
        """End those whose time is up, in the place of an engine that is not there to do it."""
        now = time.monotonic()
        for request_id, stream in list(self.streams.items()):
            for kind, at_s in stream.deadlines():
                if at_s <= now:
                    self.fail(request_id, deadline_exceeded(kind, "the engine was being started again"))
                    break

    def blame(self, request_ids: Iterable[str]) -> list[str]:
        """Count a death of the engine against the requests it was computing; returns those that it ends, having been there too
        often."""
        given_up = self.suspects.blame(request_ids, self.streams)
        for request_id in given_up:
            sentence = f"this request ({request_id}) is given up: the engine died {FAILS_AT} times while it was computing it"
            self.fail(request_id, RequestFailed(sentence, code="engine_died"))
        return given_up
