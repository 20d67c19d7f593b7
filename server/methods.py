"""Methods of HTTP: which of them a path takes, and HEAD wherever GET is (RFC 9110, 9.3.2), so that no route has to say it."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def allowed_methods(routes: Iterable[BaseRoute], path: str) -> list[str]:
    """Of all routes of `path`: the framework's own Allow knows only those of the first."""

    def takes(method: str) -> bool:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        return any(route.matches(scope)[0] is Match.FULL for route in routes)

    taken = [method for method in _METHODS if takes(method)]
    return [*taken[:1], "HEAD", *taken[1:]] if "GET" in taken else taken


class HeadAsGet:
    """Plain ASGI, the innermost: what looks at a request before its route still sees a HEAD, and the route sees a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        as_get = {**scope, "method": "GET"}  # a copy: the server below must not write a body
        try:
            await self._app(as_get, receive, send_without_body)
        finally:
            scope["route"] = as_get.get("route")  # for the trace
