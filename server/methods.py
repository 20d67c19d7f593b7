"""Methods of HTTP: those that each path takes, and HEAD wherever GET is (RFC 9110, 9.3.2), so that no route has to say it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def methods_by_path(routes: Iterable[BaseRoute]) -> dict[str, list[str]]:
    """Of each path, as routes write it: the framework's own Allow knows only the methods of a path's first route."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for route in routes:
        if isinstance(route, Route):
            found[route.path] |= set(route.methods or ())
    return {path: sorted(methods | {"HEAD"} if "GET" in methods else methods) for path, methods in found.items()}


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
