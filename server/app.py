"""The HTTP application around an engine client that somebody else starts and ends, and the server that serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engine.client import EngineClient
from engine.errors import OctavoError
from server import errors
from server.access import Access
from server.api import chat, completions, health, models
from server.api.chat import ChatRequest
from server.api.completions import CompletionRequest
from server.config import ServerConfig
from server.metrics import Metrics
from server.state import ServerState

_REQUEST_TYPES = {cls.__name__: cls for cls in (CompletionRequest, ChatRequest)}


def create_app(client: EngineClient, config: ServerConfig) -> FastAPI:
    """The application. It may be served before the engine is ready: requests get a 503 that says how far it is."""
    state = ServerState(client, config, Metrics(config.model_names[0], lambda: client.stats))
    app = FastAPI(title="Octavo", version=health.VERSION, redoc_url=None, redirect_slashes=False)
    for module in (completions, chat, models, health):  # tried in this order, so the busy ones first
        app.include_router(module.router(state))
    app.add_middleware(Access, api_keys=config.api_key)
    app.add_exception_handler(OctavoError, errors.on_octavo_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(errors.ClientDisconnected, errors.on_disconnect)
    app.add_exception_handler(ClientDisconnect, errors.on_disconnect)
    app.add_exception_handler(Exception, errors.on_bug)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema behind /docs. Bodies are parsed by server.api.body, so FastAPI has to be told what they look like."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        for path in schema["paths"].values():
            for operation in path.values():
                name = operation.pop("x-request-type", None)
                if name is None:
                    continue
                definition = _REQUEST_TYPES[name].model_json_schema(ref_template="#/components/schemas/{model}")
                components.update(definition.pop("$defs", {}))
                components[name] = definition
                content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
                operation["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
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
