"""Plain ASGI that bounds how many requests are open at once: what is more is told to come again."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.backlog import Backlog
from server.errors import octavo_error_response

# Who asks how the server is, or comes to do something about it, is always let in.
UNCOUNTED_PATHS = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/version",
        "/admin/drain",
        "/admin/log_level",
        "/admin/reload_keys",
        "/admin/reset_prefix_cache",
    }
)


class Admission:
    """Lets at most `limit` requests in (0: any number), each until its whole response is over.

    It counts before anything is awaited: of a burst whose requests all looked first and were counted later, all would pass.
    This bounds what HTTP holds, bodies and texts; what waits for the engine is bounded by `backlog`, which also knows when to
    come again.
    """

    def __init__(self, app: ASGIApp, limit: int, backlog: Backlog) -> None:
        self._app = app
        self._limit = limit
        self._backlog = backlog
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._limit or scope["type"] != "http" or scope["path"] in UNCOUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._limit:
            sentence = f"{self._limit} requests are open, which is as many as this server takes (--max-open-requests)"
            await octavo_error_response(self._backlog.overloaded("open_requests", sentence))(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1
