"""Plain ASGI around everything: the request's id, its record, and at its end a line in the log and its trace."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.request_record import RequestRecord, set_current

logger = logging.getLogger("octavo.request")

REQUEST_ID_HEADER = "X-Request-Id"
SEND_BODY = "octavo.send_body"
"""Key in the scope: a way to send for messages after the first, past the layers that only look at that one."""
# Asked every few seconds by machines: logged at debug, and not traced.
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})

_GOOD_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Trace(Protocol):
    """One request's, from its begin."""

    def end(self, record: RequestRecord, route: str | None) -> None: ...


class Tracer(Protocol):
    def begin(self, record: RequestRecord, headers: Headers) -> Trace | None:
        """Gives the record its trace_id, sampled or not: the logs of others name it too. None where nothing will be sent."""
        ...


class RequestLog:
    """Puts X-Request-Id, the client's own where that is a plain word, on every response. tracer: None traces nothing."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get(REQUEST_ID_HEADER, "")
        request_id = given_id if _GOOD_ID.fullmatch(given_id) else secrets.token_hex(16)
        record = RequestRecord(request_id, scope["method"], scope["path"])
        is_quiet = record.path in QUIET_PATHS
        trace = None if self._tracer is None or is_quiet else self._tracer.begin(record, headers)
        set_current(record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        scope[SEND_BODY] = send
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            record.error = "internal_error"
            record.status = record.status or 500  # which starlette sends, outside of every layer
            raise
        finally:
            scope.pop(SEND_BODY)  # it knows the scope: whatever the request made would stay until a garbage collection
            record.total_s = time.monotonic() - record.started_s
            logger.log(logging.DEBUG if is_quiet else logging.INFO, "request", extra={"summary": record})
            if trace is not None:
                trace.end(record, getattr(scope.get("route"), "path", None))
