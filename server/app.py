"""The HTTP application around an engine client that somebody else starts and ends, and the server that serves it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse
from starlette.types import ASGIApp

from engine.client import EngineClient
from engine.errors import ConfigError, OctavoError
from server import errors, openapi
from server.access import Access
from server.admission import Admission
from server.api import admin, chat, completions, embeddings, health, models, responses, tokenize
from server.api.body import IGNORED_FIELDS_HEADER, BodyLimits
from server.config import ServerConfig
from server.connections import ConnectionBound
from server.drain import Drain
from server.drain_gate import DrainGate
from server.file_limit import METRICS_CONNECTIONS, possible_connections
from server.keys import KeyRing
from server.limits import limited_protocol
from server.methods import HeadAsGet, methods_by_path
from server.metrics import Metrics
from server.metrics_server import create_metrics_app, listen_for_metrics
from server.otlp import traces_url
from server.pages import DOCS_PAGE, page_policies
from server.request_log import REQUEST_ID_HEADER, RequestLog, Tracer
from server.state import ServerState
from server.tls import tls_context

if TYPE_CHECKING:
    from server.tracing import Tracing

logger = logging.getLogger("octavo.server")

OnDrain = Callable[[], None]
# FastAPI's own would follow OTEL_ variables unasked, and send the messages of exceptions.
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(
    client: EngineClient,
    config: ServerConfig,
    *,
    keys: KeyRing | None = None,
    drain: Drain | None = None,
    on_drain: OnDrain | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application. It may be served before the engine is ready: requests get a 503 that says how far it is.

    keys: those of the configuration, read; None reads them. drain: how far its end has come. on_drain: what /admin/drain does.
    tracer: None where nothing is traced. Raises ConfigError.
    """
    keys = config.read_keys() if keys is None else keys
    drain = drain or Drain()
    state = ServerState(client, config, Metrics(client, config, keys.ids, health.VERSION), drain)
    app = FastAPI(
        title="Octavo", version=health.VERSION, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=_NO_TELEMETRY
    )
    # tried in this order, so the busy ones first
    modules = (completions, chat, responses, embeddings, tokenize, models, health)
    routers = [*(module.router(state) for module in modules), admin.router(state, keys, on_drain)]
    for router in routers:
        app.include_router(router)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.state.methods = methods_by_path(itertools.chain(app.routes, *(router.routes for router in routers)))
    app.state.body_limits = BodyLimits(config.max_body_bytes, config.max_json_depth)
    app.state.metrics = state.metrics
    app.add_middleware(HeadAsGet)
    app.add_middleware(Admission, limit=config.max_open_requests, backlog=state.backlog)
    app.add_middleware(DrainGate, drain=drain)
    _guard(app, config, keys, state.metrics, tracer)
    app.add_exception_handler(OctavoError, errors.on_octavo_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(errors.ClientDisconnected, errors.on_disconnect)
    app.add_exception_handler(ClientDisconnect, errors.on_disconnect)
    app.add_exception_handler(Exception, errors.on_bug)
    app.openapi = lambda: _openapi(app, bool(keys))  # type: ignore[method-assign]
    return app


def _guard(app: FastAPI, config: ServerConfig, keys: KeyRing, metrics: Metrics, tracer: Tracer | None) -> None:
    """The layers that look first, and so are added last: strangers are not counted, and preflights bring no keys."""
    app.add_middleware(errors.AnswerBugs)
    app.add_middleware(
        Access,
        keys=keys,
        isolate=not config.shared_prefix_cache,
        origins=config.cors_origins,
        policies=page_policies(),
        observe=metrics.observe_response,
    )
    app.add_middleware(RequestLog, tracer=tracer)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, IGNORED_FIELDS_HEADER, "Retry-After"],
        )


async def _docs() -> FileResponse:
    """A page of our own: FastAPI's loads its parts from the internet, where a server's users may have none."""
    return FileResponse(DOCS_PAGE, media_type="text/html")


def _openapi(app: FastAPI, needs_keys: bool) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.build(app, needs_keys=needs_keys)
    return app.openapi_schema


class _Server(uvicorn.Server):
    """Leaves the signals to others: uvicorn raises a caught one again after its drain, and the exit code would be -15.

    on_end: awaited when everything has been answered.
    """

    def __init__(self, config: uvicorn.Config, on_end: Callable[[], Awaitable[None]] | None = None) -> None:
        super().__init__(config)
        self._on_end = on_end

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets)
        if self._on_end is not None:
            await self._on_end()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _ServerWithMetrics(_Server):
    """Serves the metrics beside the application, until that has ended: what happens in a drain is seen too."""

    def __init__(
        self,
        config: uvicorn.Config,
        metrics: uvicorn.Server,
        sock: socket.socket,
        on_end: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(config, on_end)
        self._metrics = metrics
        self._metrics_socket = sock

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        serving = asyncio.create_task(self._metrics.serve(sockets=[self._metrics_socket]))
        try:
            await super().serve(sockets)
        finally:
            self._metrics.should_exit = True
            await serving


def create_server(
    client: EngineClient, config: ServerConfig, *, drain: Drain | None = None, on_drain: OnDrain | None = None
) -> uvicorn.Server:
    """The application behind uvicorn: `serve` with a listening socket, and set `should_exit` for an orderly end.

    drain: see create_app. on_drain: called for /admin/drain, any number of times. Raises ConfigError where keys, TLS or
    --metrics-port are no good, or --max-connections more than this process may open.
    """
    max_connections = possible_connections(config.max_connections, config.max_open_requests)
    keys = config.read_keys()
    for note in (*keys.notes, *_exposure(config, keys)):
        logger.warning("%s", note)
    tracing = _start_tracing(config)
    app = create_app(client, config, keys=keys, drain=drain, on_drain=on_drain, tracer=tracing)
    main = _uvicorn_config(app, config, max_connections, app.state.metrics.observe_refused_connection)
    on_end = tracing.close if tracing else None
    if config.metrics_port is None:
        return _Server(main, on_end)
    sock = listen_for_metrics(config.host, config.metrics_port)
    logger.info("metrics are at port %d, without a key", sock.getsockname()[1])
    metrics = _Server(_uvicorn_config(create_metrics_app(app.state.metrics), config, METRICS_CONNECTIONS))
    return _ServerWithMetrics(main, metrics, sock, on_end)


def _start_tracing(config: ServerConfig) -> Tracing | None:
    if config.otlp_endpoint is None:
        return None
    from server.tracing import Tracing

    url = traces_url(config.otlp_endpoint)
    try:
        tracing = Tracing(url, health.VERSION)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"OpenTelemetry refuses one of its OTEL_ variables: {error}", param="otlp_endpoint") from None
    logger.info("traces are sent to %s", url)
    return tracing


def _uvicorn_config(
    app: ASGIApp, config: ServerConfig, max_connections: int, observe_refused: Callable[[], None] = lambda: None
) -> uvicorn.Config:
    cert, key = config.tls_cert, config.tls_key
    bound = ConnectionBound(max_connections, observe_refused)
    return uvicorn.Config(
        app,
        http=limited_protocol(
            read_timeout_s=config.read_timeout_s,
            write_timeout_s=config.write_timeout_s,
            max_body_bytes=config.max_body_bytes,
            bound=bound,
        ),
        ssl_context_factory=None if cert is None else lambda *_: tls_context(cert, key, bound.may_shake_hands),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def _exposure(config: ServerConfig, keys: KeyRing) -> list[str]:
    """What others on the network could do that the owner may not have meant."""
    if _is_loopback(config.host):
        return []
    notes = []
    if not keys:
        notes.append(f"whoever reaches {config.host} may use this server: it has no API key (--api-key-file)")
    elif config.tls_cert is None:
        notes.append(f"keys and prompts travel to {config.host} unencrypted: give --tls-cert, or put a proxy with TLS in front")
    if config.metrics_port is not None:
        notes.append(f"whoever reaches {config.host} may read the metrics: --metrics-port wants no key")
    return notes


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
