"""GET /v1/models: the names this server answers to."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from server.state import ServerState


class ModelCard(msgspec.Struct, kw_only=True):
    """max_model_len: null until the engine has decided it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "octavo"
    root: str
    parent: None = None
    max_model_len: int | None


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["models"])

    def card(name: str) -> ModelCard:
        ready = state.client.ready
        limit = ready.max_model_len if ready else None
        return ModelCard(id=name, created=state.created, root=state.config.model, max_model_len=limit)

    @routes.get("/v1/models")
    async def list_models() -> Response:
        """Every name of the served model."""
        content = ModelList(data=[card(name) for name in state.config.model_names])
        return Response(msgspec.json.encode(content), media_type="application/json")

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One name of the served model."""
        return Response(msgspec.json.encode(card(state.resolve_model(name))), media_type="application/json")

    return routes
