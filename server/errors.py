"""Engine error -> OpenAI error body and HTTP status: the one table, and the only place where error JSON is made."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    OctavoError,
    Overloaded,
    RequestFailed,
)
from server.request_record import current

logger = logging.getLogger("octavo.server")

CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that went away; nobody is left to read it


class Unauthorized(OctavoError):
    """The request brings no API key, or a wrong one (401)."""

    default_code = "invalid_api_key"


class Forbidden(OctavoError):
    """The API key given is not for this (403)."""

    default_code = "insufficient_permissions"


class NotFound(OctavoError):
    """A path names an object that this server does not have, or no longer (404)."""

    default_code = "not_found"


class TooManyRequests(OctavoError):
    """As many requests are open as this server takes (429)."""

    default_code = "rate_limit_exceeded"


class BodyTooLarge(OctavoError):
    """The request's body is more than this server reads (413)."""

    default_code = "body_too_large"


class ClientDisconnected(Exception):
    """The client went away before its answer began."""


# First match wins. Whatever is not here (a ConfigError, say) is no request's fault: 500.
_TABLE: tuple[tuple[type[OctavoError], int, str], ...] = (
    (InvalidRequest, 400, "invalid_request_error"),
    (Unauthorized, 401, "invalid_request_error"),
    (Forbidden, 403, "invalid_request_error"),
    (ModelNotFound, 404, "invalid_request_error"),
    (NotFound, 404, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (TooManyRequests, 429, "rate_limit_error"),
    (Overloaded, 429, "rate_limit_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (EngineUnavailable, 503, "service_unavailable_error"),
    (RequestFailed, 500, "server_error"),
)
_RETRY_AFTER_S = {429: 1, 503: 2}  # where the error does not say
_HTTP_MESSAGES = {
    404: ("There is no such path; see /docs for those there are.", "not_found"),
    405: ("This path does not take this method; see /docs.", "method_not_allowed"),
}


def status_and_type(error: OctavoError) -> tuple[int, str]:
    """HTTP status and OpenAI error type."""
    return next(((status, kind) for cls, status, kind in _TABLE if isinstance(error, cls)), (500, "server_error"))


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error object as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def error_event_body(error: Exception) -> bytes:
    """The same for an error in the middle of a stream. What is no OctavoError is a bug: logged, and told without details."""
    note_error(error)
    if isinstance(error, OctavoError):
        return error_body(error.message, status_and_type(error)[1], error.param, error.code)
    logger.error("a stream ended by an internal error", exc_info=error)
    return error_body("The server met an internal error.", "server_error", code="internal_error")


def note_error(error: BaseException) -> None:
    """Write down what the request that is worked for ended with."""
    current().error = error.code or "server_error" if isinstance(error, OctavoError) else "internal_error"


def octavo_error_response(error: OctavoError) -> Response:
    note_error(error)
    status, kind = status_and_type(error)
    headers: Mapping[str, str] = {}
    if status in _RETRY_AFTER_S:
        seconds = _RETRY_AFTER_S[status] if error.retry_after_s is None else max(1, math.ceil(error.retry_after_s))
        headers = {"Retry-After": str(seconds)}
    elif status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    body = error_body(error.message, kind, error.param, error.code)
    return Response(body, status, headers=headers, media_type="application/json")


async def on_octavo_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, OctavoError)
    return octavo_error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Wrong paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    headers = error.headers
    if error.status_code == 405 and (path := getattr(request.scope.get("route"), "path", None)):
        headers = {"Allow": ", ".join(request.app.state.methods[path])}
    message, code = _HTTP_MESSAGES.get(error.status_code, ("The request was refused.", "invalid_request"))
    current().error = code
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = error_body(message, kind, code=code)
    return Response(body, error.status_code, headers=headers, media_type="application/json")


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    current().error = "client_disconnected"
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def on_bug(_request: Request, _error: Exception) -> Response:
    """Anything unforeseen outside of the application; the traceback goes to the log by way of the server."""
    return _bug_response()


def _bug_response() -> Response:
    body = error_body("The server met an internal error.", "server_error", code="internal_error")
    return Response(body, 500, media_type="application/json")


class AnswerBugs:
    """Plain ASGI that answers what nobody foresaw. Starlette's own answer would come from outside of all layers: without the
    request's id, and counted by none. What breaks in the middle of a response is left to the server, which cuts the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_see(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            note_error(error)
            logger.error("a request ended by an internal error", exc_info=error)
            await _bug_response()(scope, receive, send)
