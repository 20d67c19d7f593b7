"""Plain ASGI in front of the application: API keys and request ids."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Unauthorized, octavo_error_response

OPEN_PATHS = frozenset({"/health"})
REQUEST_ID_HEADER = "X-Request-Id"
SEND_BODY = "octavo.send_body"
"""Key in the scope: a way to send for messages after the first, past the layers that only look at that one."""


class Access:
    """Refuses requests without one of `api_keys` (no keys: everybody is welcome), and puts X-Request-Id on every response.

    The path compared is the one that routing uses, not a URL put together from headers that the client chooses.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get(REQUEST_ID_HEADER, "")
        request_id = given_id if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given_id) else secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        scope[SEND_BODY] = send
        app = self._app
        if self._api_keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            message = "A wrong API key." if "authorization" in headers else "This server wants an API key."
            app = octavo_error_response(Unauthorized(f"{message} Send it as: Authorization: Bearer <key>."))
        await app(scope, receive, send_with_id)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, expected) for expected in self._api_keys]
        return scheme.lower() == "bearer" and any(matches)
