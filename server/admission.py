"""Plain ASGI that bounds how many requests are open at once: what is more is told to come again."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import TooManyRequests, octavo_error_response

UNCOUNTED_PATHS = frozenset({"/health", "/metrics", "/version"})


class Admission:
    """Lets at most `limit` requests in (0: any number), each until its whole response is over.

    It counts before anything is awaited: of a burst whose requests all looked first and were counted later, all would pass.
    Whoever asks how the server is, is always let in.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._limit or scope["type"] != "http" or scope["path"] in UNCOUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._limit:
            error = TooManyRequests(f"{self._limit} requests are open, which is as many as this server takes; try again soon.")
            await octavo_error_response(error)(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1
