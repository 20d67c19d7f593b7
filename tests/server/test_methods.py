"""Every path tells which methods it takes, and answers HEAD wherever it answers GET."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpx

from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.served import ask, served, talk
from tests.server.test_bad_input import error_of

STORED = "/v1/responses/resp_x"
COUNTS_TOKENS = "/v1/responses/input_tokens"  # for GET and DELETE it is a response's id like any other: a 404
GET, POST = {"GET", "HEAD"}, {"POST"}
PATHS = {
    "/": GET, "/docs": GET, "/openapi.json": GET, "/version": GET, "/metrics": GET,
    "/health": GET, "/health/live": GET, "/health/ready": GET,
    "/v1/models": GET, "/v1/models/tiny": GET, "/v1/models/a/b": GET,
    "/v1/completions": POST, "/v1/chat/completions": POST, "/v1/embeddings": POST, "/tokenize": POST, "/detokenize": POST,
    "/v1/responses": POST, STORED: GET | {"DELETE"}, "/v1/responses/resp_x/cancel": POST,
    "/v1/responses/resp_x/input_items": GET, COUNTS_TOKENS: POST,
    "/admin/drain": POST, "/admin/log_level": POST, "/admin/reload_keys": POST, "/admin/reset_prefix_cache": POST,
}  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
ADMIN = {"Authorization": "Bearer k"}


CONFIG = ServerConfig(model="tiny", api_key=["k ops api metrics admin"])


def ask_all(asked: Iterable[tuple[str, str]], config: ServerConfig = CONFIG, **options: Any) -> list[httpx.Response]:
    """The answers to (method, path), all of one application."""

    async def scenario() -> list[httpx.Response]:
        async with FakeEngineClient().http(config) as http:
            return [await http.request(method, path, **options) for method, path in asked]

    return asyncio.run(scenario())


def test_this_list_is_whole(api: Api) -> None:
    named = {
        path.replace("{response_id}", "resp_x").replace("{name}", "tiny") for path in api.get("/openapi.json").json()["paths"]
    }
    assert named <= set(PATHS), named - set(PATHS)


def test_a_wrong_method_is_told_the_right_ones() -> None:
    wrong = [(method, path) for path, right in PATHS.items() for method in METHODS if method not in right]
    wrong = [(method, path) for method, path in wrong if not (path == COUNTS_TOKENS and method in PATHS[STORED])]
    for (method, path), response in zip(wrong, ask_all(wrong, headers=ADMIN), strict=True):
        assert response.status_code == 405, (method, path)
        assert set(response.headers["Allow"].split(", ")) == PATHS[path], (method, path)
        if method != "HEAD":
            error = error_of(response, 405)
            assert error["code"] == "method_not_allowed" and error["type"] == "invalid_request_error"


def test_head_is_get_without_the_body() -> None:
    paths = [path for path, methods in PATHS.items() if "HEAD" in methods]
    gets, heads = (ask_all([(method, path) for path in paths], headers=ADMIN) for method in ("GET", "HEAD"))
    for path, get, head in zip(paths, gets, heads, strict=True):
        assert head.status_code == get.status_code and not head.content, path
        varying = {"x-request-id"} | ({"content-length"} if path == "/metrics" else set())
        of_get, of_head = ({n: v for n, v in r.headers.items() if n not in varying} for r in (get, head))
        assert of_head == of_get, path
        assert int(head.headers["Content-Length"]) > 0, path


def test_head_wants_the_key_that_get_wants() -> None:
    paths = [path for path, methods in PATHS.items() if "HEAD" in methods]
    for path, response in zip(paths, ask_all([("HEAD", path) for path in paths]), strict=True):
        assert (response.status_code != 401) is path.startswith("/health"), path


def test_head_of_what_is_not_here_is_404(api: Api) -> None:
    for path in ("/nothing", "/v1/models/other", "/v1/responses/resp_x"):
        response = api.request("HEAD", path)
        assert response.status_code == 404 and not response.content


def test_after_a_head_the_connection_goes_on() -> None:
    """A body, or a length that is waited for, would be taken for the begin of the next answer."""

    async def scenario() -> None:
        async with served() as (_, port):
            lines = "{} /v1/models HTTP/1.1\r\nHost: x\r\n{}\r\n"
            both = await talk(port, lines.format("HEAD", "").encode(), lines.format("GET", "Connection: close\r\n").encode())
            head, _, rest = both.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and rest.startswith(b"HTTP/1.1 200"), both
            body = rest.partition(b"\r\n\r\n")[2]
            assert f"content-length: {len(body)}".encode() in head.lower(), both

    asyncio.run(scenario())


def test_a_browser_may_ask_for_the_head_too() -> None:
    async def scenario() -> None:
        async with served(cors_origins=["https://page.example"]) as (_, port):
            head = (
                "OPTIONS /v1/models HTTP/1.1\r\nHost: x\r\nOrigin: https://page.example\r\n"
                "Access-Control-Request-Method: HEAD\r\n"
                "Access-Control-Request-Headers: authorization\r\nConnection: close\r\n\r\n"
            )
            assert (await ask(port, head.encode())).status == 200

    asyncio.run(scenario())
