"""Plain ASGI that counts open work for the end of the server, and refuses more once that has come."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import EngineUnavailable
from server.admission import UNCOUNTED_PATHS
from server.drain import Drain
from server.errors import octavo_error_response

RETRY_AFTER_S = 1.0
"""Another server behind the same address may take the request at once."""


class DrainGate:
    """A request is open work until its whole response is over. Who asks how the server is gets an answer to the last."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED_PATHS:
            await self._app(scope, receive, send)
            return
        if self._drain.is_closed:
            await _refuse(scope, receive, send)
            return
        self._drain.opened()
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.ended()


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = EngineUnavailable(
        "The server is shutting down; send the request to another, or again when it is back.", retry_after_s=RETRY_AFTER_S
    )

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    await octavo_error_response(error)(scope, receive, send_last)
