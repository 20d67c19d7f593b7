"""Plain ASGI in front of the application: API keys, and headers that keep browsers from guessing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import OctavoError
from server.errors import Forbidden, NotFound, Unauthorized, octavo_error_response
from server.keys import ADMIN, API, METRICS, ApiKey, KeyRing
from server.request_record import current

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
API_KEY = "octavo.api_key"
"""Key in the scope: the ApiKey that the request brought; None where the server has none."""
TENANT = "octavo.tenant"
"""Key in the scope: whose computed prompt beginnings the request may share; empty where all share them."""

# Probes and scrapes, which would drown the others: a probe's 503 is no client's.
_UNCOUNTED = OPEN_PATHS | {"/metrics"}
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

ResponseObserver = Callable[[str, int], None]
"""Is told of every response but those to probes and scrapes: the key's id ("" where the server has no keys, "invalid" for a
stranger's) and the status."""


def owner(scope: Scope) -> str:
    """Whose a request is, for what is stored: its key's id, or "" on a server without keys."""
    key: ApiKey | None = scope[API_KEY]
    return key.id if key else ""


def cache_salt(scope: Scope, given: str) -> str:
    """The salt of a request's prompt pages: what the client gave, within what belongs to its key."""
    tenant: str = scope[TENANT]
    return f"{tenant}/{given}" if tenant else given  # an id holds no slash, so no two pairs become one


class Access:
    """Refuses requests without a key of `keys` that is good for their path (no keys: everybody is welcome), and those that a
    browser sends for a page elsewhere, unless that is one of `origins`.

    isolate: with several key ids prompt pages are shared only among the requests of one. policies: the Content-Security-Policy
    of each page. The path compared is the one that routing uses, not a URL put together from headers that the client chooses.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        *,
        isolate: bool,
        origins: Collection[str],
        policies: Mapping[str, str],
        observe: ResponseObserver,
    ) -> None:
        self._app = app
        self._keys = keys
        self._isolate = isolate
        self._origins = frozenset(origins)
        self._policies = policies
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        app = self._app
        key = self._keys.find(_bearer(headers)) if self._keys else None
        key_id = key.id if key else "invalid" if self._keys and scope["path"] not in OPEN_PATHS else ""
        current().key_id = key_id
        policy = self._policies.get(scope["path"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["X-Content-Type-Options"] = "nosniff"
                if policy is not None:
                    added["Content-Security-Policy"] = policy
                    added["Referrer-Policy"] = "no-referrer"
                if scope["path"] not in _UNCOUNTED:
                    self._observe(key_id, message["status"])
            await send(message)

        scope[API_KEY] = key
        scope[TENANT] = key.id if key and self._isolate and self._keys.num_tenants > 1 else ""
        try:
            self._check(scope, headers, key)
        except OctavoError as error:
            app = octavo_error_response(error)
        await app(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: Headers, key: ApiKey | None) -> None:
        """Raises OctavoError where the request may not pass."""
        path: str = scope["path"]
        if path in OPEN_PATHS:
            return
        if self._keys and key is None:
            message = "A wrong API key." if "authorization" in headers else "This server wants an API key."
            raise Unauthorized(f"{message} Send it as: Authorization: Bearer <key>.")
        # A pattern's $ also matches before a line break at the end, so /metrics%0A would be routed like /metrics.
        if not path.isprintable():
            raise NotFound("There is no such path; see /docs for those there are.")
        scope_needed = METRICS if path == "/metrics" else ADMIN if _is_admin(path) else API
        if key is not None and not key.may(scope_needed):
            raise Forbidden(f"This API key has no scope {scope_needed}, which {_what(scope_needed)} needs.")
        if _is_admin(path) and not self._keys.has_scope(ADMIN):
            raise NotFound("The admin routes need an API key with scope admin, and this server has none: see --api-key-file.")
        self._check_page(scope["method"], headers)

    def _check_page(self, method: str, headers: Headers) -> None:
        """A page of another site can have a browser send a request whose answer it may not read; that is refused too."""
        if method in _SAFE_METHODS or headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return
        if not self._origins & {"*", headers.get("origin", "")}:
            raise Forbidden("A page of another origin may not use this server; its owner can allow it with --cors-origins.")


def _bearer(headers: Headers) -> bytes:
    """The key given, which is never empty where there is one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_admin(path: str) -> bool:
    return path == "/admin" or path.startswith("/admin/")


def _what(scope: str) -> str:
    return {METRICS: "/metrics", ADMIN: "everything under /admin/"}.get(scope, "this path")
