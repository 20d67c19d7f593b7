"""/metrics on a port of its own, which needs no key: who may reach it is left to the network."""

from __future__ import annotations

import errno
import os
import socket

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import ConfigError
from server.errors import NotFound, octavo_error_response
from server.metrics import Metrics


def create_metrics_app(metrics: Metrics) -> ASGIApp:
    """Answers GET and HEAD of /metrics; everything else is a 404."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            response = metrics_response(metrics, Headers(scope=scope))
            response.headers["X-Content-Type-Options"] = "nosniff"
        else:
            response = octavo_error_response(NotFound("This port serves GET /metrics, and nothing else."))
        await response(scope, receive, send)

    return app


def metrics_response(metrics: Metrics, headers: Headers) -> Response:
    """The metrics, in the format that the request's headers ask for."""
    body, content_type = metrics.render(headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type, "Vary": "Accept"})


def listen_for_metrics(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise ConfigError(f"there is no address {host} to listen on: give one of this machine's with --host") from None
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be opened: {os.strerror(error.errno or 0)}"
        message = f"port {port} on {host} {reason}: choose another with --metrics-port"
        raise ConfigError(message, param="metrics_port") from None
