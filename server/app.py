"""The HTTP application around an engine client that somebody else starts and ends, and the server that serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from engine.client import EngineClient
from engine.errors import OctavoError
from server import errors, openapi
from server.access import Access
from server.admission import Admission
from server.api import chat, completions, embeddings, health, models, responses, tokenize
from server.config import ServerConfig
from server.metrics import Metrics
from server.state import ServerState

DOCS_PAGE = Path(__file__).parent / "static" / "docs.html"


def create_app(client: EngineClient, config: ServerConfig) -> FastAPI:
    """The application. It may be served before the engine is ready: requests get a 503 that says how far it is."""
    state = ServerState(client, config, Metrics(config.model_names[0], lambda: client.stats))
    app = FastAPI(title="Octavo", version=health.VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (
        completions,
        chat,
        responses,
        embeddings,
        tokenize,
        models,
        health,
    ):  # tried in this order, so the busy ones first
        app.include_router(module.router(state))
    app.add_middleware(Admission, limit=config.max_open_requests)
    app.add_middleware(Access, api_keys=config.api_key)  # added last, so asked first: strangers are not counted
    app.add_exception_handler(OctavoError, errors.on_octavo_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(errors.ClientDisconnected, errors.on_disconnect)
    app.add_exception_handler(ClientDisconnect, errors.on_disconnect)
    app.add_exception_handler(Exception, errors.on_bug)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.openapi = lambda: _openapi(app, config)  # type: ignore[method-assign]
    return app


async def _docs() -> FileResponse:
    """A page of our own: FastAPI's loads its parts from the internet, where a server's users may have none."""
    return FileResponse(DOCS_PAGE, media_type="text/html")


def _openapi(app: FastAPI, config: ServerConfig) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi.build(app, needs_keys=bool(config.api_key))
    return app.openapi_schema


class _Server(uvicorn.Server):
    """Leaves the signals to others: uvicorn raises a caught one again after its drain, and the exit code would be -15."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def create_server(client: EngineClient, config: ServerConfig) -> uvicorn.Server:
    """The application behind uvicorn: `serve` with a listening socket, and set `should_exit` for an orderly end."""
    return _Server(
        uvicorn.Config(
            create_app(client, config),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
    )
