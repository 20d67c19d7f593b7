"""Where traces go to, and whether this installation can send them: looked at before anything is loaded."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from urllib.parse import urlsplit

from engine.errors import ConfigError

GRPC_PORT = 4317
HTTP_PORT = 4318
TRACES_PATH = "/v1/traces"

_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def traces_url(endpoint: str) -> str:
    """The whole URL for what the user gave, which may be a collector's address alone. Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        sentence = f"must be the URL of a collector, like http://localhost:{HTTP_PORT}"
        hint = " (passwords go into OTEL_EXPORTER_OTLP_HEADERS)" if "@" in parts.netloc else f", got {endpoint!r}"
        raise ConfigError(sentence + hint, param="otlp_endpoint")
    if port == GRPC_PORT and parts.path in ("", "/"):
        raise ConfigError(
            f"port {GRPC_PORT} is a collector's port for gRPC; traces are sent over HTTP, for which it has port {HTTP_PORT}",
            param="otlp_endpoint",
        )
    return endpoint.rstrip("/") + TRACES_PATH if parts.path in ("", "/") else endpoint


def check_tracing(endpoint: str | None) -> None:
    """Raises ConfigError where `endpoint` is no URL, or what sends traces is not installed."""
    if endpoint is None:
        return
    traces_url(endpoint)
    if not all(map(_is_installed, _NEEDED)):
        raise ConfigError(
            f"traces need OpenTelemetry, which is not installed: {sys.executable} -m pip install 'octavo[tracing]'",
            param="otlp_endpoint",
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
