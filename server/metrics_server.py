"""/metrics on a port of its own, which needs no key: who may reach it is left to the network."""

from __future__ import annotations

import errno
import os
import socket

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import ConfigError
from server.errors import NotFound, octavo_error_response
from server.metrics import CONTENT_TYPE, Metrics


def create_metrics_app(metrics: Metrics) -> ASGIApp:
    """Answers GET and HEAD of /metrics; everything else is a 404."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD"):
            response = Response(metrics.render(), media_type=CONTENT_TYPE, headers={"X-Content-Type-Options": "nosniff"})
        else:
            response = octavo_error_response(NotFound("This port serves GET /metrics, and nothing else."))
        await response(scope, receive, send)

    return app


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
