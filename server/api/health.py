"""GET /health and its kin, /version, /metrics and the page at /: how the server is, for machines and for people."""

from __future__ import annotations

import html
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from engine.client import EngineClient
from engine.messages import LoadProgress
from server.config import ServerConfig
from server.metrics_server import metrics_response
from server.state import ServerState

PAGE = Path(__file__).parent.parent / "static" / "index.html"


def _version() -> str:
    """Of the installed package; a checkout that is run without having been installed says so."""
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "0+checkout"


VERSION = _version()


class Health(msgspec.Struct):
    """status: starting, ready, recovering, failed or stopping."""

    status: str
    detail: str
    progress: LoadProgress | None


class Version(msgspec.Struct):
    version: str


def router(state: ServerState) -> APIRouter:
    routes = APIRouter(tags=["server"])
    page = Template(PAGE.read_text(encoding="utf-8"))

    def answer(is_well: bool) -> Response:
        client = state.client
        is_draining = state.drain.has_begun and client.state != "failed"
        progress = client.progress if client.state in ("starting", "recovering") else None
        detail = state.describe()
        if client.state == "ready" and not is_well and not is_draining:
            detail = "The engine completes no step at the moment."
        health = Health("stopping" if is_draining else client.state, detail, progress)
        return Response(msgspec.json.encode(health), 200 if is_well else 503, media_type="application/json")

    @routes.get("/health")
    @routes.get("/health/ready")
    async def get_health() -> Response:
        """200 when the engine completes steps (a small one is tried where none has lately), 503 with the reason when not."""
        return answer(not state.drain.has_begun and await state.client.can_step())

    @routes.get("/health/live")
    async def get_liveness() -> Response:
        """200 while this server runs, also while it loads, starts its engine again or drains; 503 when only a restart helps."""
        return answer(state.client.state != "failed")

    @routes.get("/version")
    async def get_version() -> Response:
        """Octavo's version."""
        return Response(msgspec.json.encode(Version(VERSION)), media_type="application/json")

    @routes.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        """Prometheus metrics."""
        return metrics_response(state.metrics, request.headers)

    @routes.get("/", include_in_schema=False)
    async def get_page(request: Request) -> Response:
        """The page for a browser."""
        fields = {
            "model": state.config.model_names[0],
            "state": state.client.state,
            "detail": state.describe(),
            "facts": _facts(state),
            "curl": curl_command(state.client, state.config, str(request.base_url).rstrip("/")),
            "version": VERSION,
        }
        escaped = {name: html.escape(value) for name, value in fields.items()}
        refresh = "" if state.client.state == "ready" else '<meta http-equiv="refresh" content="2">'
        return HTMLResponse(page.substitute(escaped, refresh=refresh))

    return routes


def _facts(state: ServerState) -> str:
    ready = state.client.ready
    if ready is None:
        return ""
    return (
        f"{ready.architecture}, {ready.dtype} on {ready.device}; context {ready.max_model_len:,} tokens; "
        f"room for {ready.kv_cache_tokens:,} tokens in the KV cache"
    )


def curl_command(client: EngineClient, config: ServerConfig, base_url: str) -> str:
    """A command to paste that gets an answer from this server: a chat where the model has a template, else a completion.

    The likeliest answer: a small model like the demo says strange things where it is let to choose at random.
    """
    body: dict[str, object] = {"model": config.model_names[0], "temperature": 0}
    chat = client.state != "ready" or client.tokenizer.has_chat_template
    if chat:
        path, question = "chat/completions", "What is the capital of France?"
        body["messages"] = [{"role": "user", "content": question}]
    else:
        path = "completions"
        body["prompt"] = "The capital of France is"
    key = ' -H "Authorization: Bearer $OCTAVO_API_KEY"' if config.api_key else ""
    text = msgspec.json.encode(body).decode().replace("'", "'\\''")
    return f"curl {base_url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{text}'"
