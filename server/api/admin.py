"""POST /admin/drain, reset_prefix_cache, log_level and reload_keys, for the owner of the server: with a key of scope admin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import ConfigError, EngineUnavailable, InvalidRequest
from server.access import API_KEY
from server.api.body import RequestBody, read_json_object, validate
from server.config import ServerConfig, engine_log_level
from server.errors import Forbidden
from server.keys import ADMIN, ApiKey, KeyRing
from server.state import ServerState

logger = logging.getLogger("octavo.server")


class LogLevelRequest(RequestBody):
    level: Literal["debug", "info", "warning", "error"]


class Done(msgspec.Struct):
    status: str


def router(state: ServerState, keys: KeyRing, on_drain: Callable[[], None] | None) -> APIRouter:
    """keys: those that requests are checked for. on_drain: does what SIGTERM does; None where nobody could."""
    routes = APIRouter(include_in_schema=False)

    @routes.post("/admin/drain")
    async def drain(request: Request) -> Response:
        """Take no new work, finish what is open, end."""
        key = _check(request)
        if on_drain is None:
            raise EngineUnavailable("This server cannot be drained over HTTP: send its process SIGTERM.")
        logger.info("drain, asked for by key %s", key.id)
        on_drain()
        return _done("draining", 202)

    @routes.post("/admin/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        """Forget what the KV pages hold: prompts that come from now on are computed anew. Open requests go on."""
        key = _check(request)
        state.require_ready()
        state.client.reset_prefix_cache()
        logger.info("prefix cache reset, asked for by key %s", key.id)
        return _done("reset")

    @routes.post("/admin/log_level")
    async def set_log_level(request: Request) -> Response:
        """From now on log what is at least of this level; the engine's own process does too."""
        key = _check(request)
        body, headers = validate(LogLevelRequest, await read_json_object(request), strict=state.config.strict)
        logging.getLogger().setLevel(body.level.upper())
        state.client.set_log_level(engine_log_level(body.level))
        logger.info("log level %s, asked for by key %s", body.level, key.id)
        return _done(body.level, headers=headers)

    @routes.post("/admin/reload_keys")
    async def reload_keys(request: Request) -> Response:
        """Read the key file again. Where anything is wrong with it the keys stay as they are. Open requests go on."""
        key = _check(request)
        new = _read_again(state.config)
        keys.replace(new)
        for note in new.notes:
            logger.warning("%s", note)
        logger.info("%d API keys after a reload, asked for by key %s", len(new), key.id)
        return _done("reloaded")

    return routes


def _read_again(config: ServerConfig) -> KeyRing:
    """Raises InvalidRequest: the owner is to hear what is wrong."""
    if config.api_key_file is None:
        raise InvalidRequest("This server has no key file to read: it was started without --api-key-file.")
    try:
        keys = config.read_keys(again=True)
    except ConfigError as error:
        raise InvalidRequest(f"The keys stay as they are: {error.message}.") from None
    if not keys.has_scope(ADMIN):
        raise InvalidRequest("The keys stay as they are: without one of scope admin they could not be read again.")
    return keys


def _check(request: Request) -> ApiKey:
    """The key, looked at once more: what stands in front of the routes may change. Raises Forbidden."""
    key: ApiKey | None = request.scope[API_KEY]
    if key is None or not key.may(ADMIN):
        raise Forbidden("This needs an API key with scope admin.")
    return key


def _done(status: str, code: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(Done(status)), code, headers=headers, media_type="application/json")
