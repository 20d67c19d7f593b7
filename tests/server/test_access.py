"""Who may do what: keys and scopes, paths that look like others, pages of other origins, and what one key sees of another."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from typing import Any

import httpx
import pytest

from server.access import cache_salt
from server.config import ServerConfig
from tests.metrics_text import metric
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.served import ask, served
from tests.server.test_bad_input import error_of

KEYS = ["user-key ann", "other-key bob", "prom-key prometheus metrics", "admin-key ops admin", "all-key all api metrics admin"]
ROUTES = [
    ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/version"), ("GET", "/v1/models"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/responses"), ("GET", "/v1/responses/x"),
    ("POST", "/v1/embeddings"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/nothing"), ("OPTIONS", "/v1/models"),
    ("HEAD", "/v1/models"), ("HEAD", "/metrics"), ("GET", "/metrics"), ("POST", "/admin/drain"), ("POST", "/admin/log_level"),
    ("POST", "/admin/reset_prefix_cache"), ("POST", "/admin/reload_keys"), ("PUT", "/v1/models"), ("TRACE", "/"),
    ("PROPFIND", "/health/x"),
]  # fmt: skip


@pytest.fixture
def guarded(api: Api) -> Api:
    api.config = ServerConfig(model="tiny", api_key=KEYS)
    return api


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_a_key(guarded: Api, method: str, path: str) -> None:
    for headers in ({}, bearer("user-ke"), bearer(""), bearer("ann"), bearer("user-key ann"), {"Authorization": "user-key"}):
        response = guarded.request(method, path, headers=headers)
        assert response.status_code == 401 and response.headers["X-Request-Id"]
        assert method == "HEAD" or error_of(response, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_but_how_the_server_is_may_be_asked_by_all(guarded: Api, path: str) -> None:
    assert guarded.get(path).status_code != 401 and guarded.request("HEAD", path).status_code != 401


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("user-key", {"api"}),
        ("prom-key", {"metrics"}),
        ("admin-key", {"metrics", "admin"}),
        ("all-key", {"api", "metrics", "admin"}),
    ],
)
def test_scopes(guarded: Api, key: str, allowed: set[str]) -> None:
    for scope, method, path in (
        ("api", "GET", "/v1/models"), ("api", "GET", "/"), ("api", "GET", "/nothing"), ("metrics", "GET", "/metrics"),
        ("metrics", "HEAD", "/metrics"), ("admin", "POST", "/admin/log_level"), ("admin", "GET", "/admin"),
        ("admin", "GET", "/admin/"),
    ):  # fmt: skip
        response = guarded.request(method, path, headers=bearer(key), json={"level": "warning"} if method == "POST" else None)
        assert (response.status_code != 403) is (scope in allowed), (path, response.text)
        if response.status_code == 403 and method != "HEAD":
            error = error_of(response, 403)
            assert error["code"] == "insufficient_permissions" and f"scope {scope}" in error["message"]


# What routing takes for /metrics or an admin route, or might.
DISGUISES = [
    "/metrics%0A", "/metrics%0a", "/%6Detrics", "/metrics/", "//metrics", "/./metrics", "/metrics%00", "/metrics?x", "/METRICS",
    "/metrics#x", "/v1/../metrics", "/metrics;x", "/%2Fmetrics", "/metrics%20", "/health/../metrics", "/health%2F..%2Fmetrics",
]  # fmt: skip


@pytest.mark.parametrize("disguise", DISGUISES)
def test_no_other_spelling_of_a_path_gets_around_a_scope(disguise: str) -> None:
    async def scenario() -> None:
        async with served(api_key=KEYS) as (_, port):

            async def send(method: str, path: str, key: str | None, host: str = "x") -> tuple[int, bytes]:
                authorization = f"Authorization: Bearer {key}\r\n" if key else ""
                head = (
                    f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{authorization}Content-Length: 0\r\nConnection: close\r\n\r\n"
                )
                answer = await ask(port, head.encode())
                return answer.status, answer.body

            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                status, _ = await send(method, disguise, None)
                assert status in (400, 401), (method, status)
                assert b"octavo_" not in (await send(method, disguise, "user-key"))[1]
            for path in (disguise.replace("metrics", "admin/drain"), disguise.replace("metrics", "admin/reset_prefix_cache")):
                for method in ("POST", "GET"):
                    assert (await send(method, path, "user-key"))[0] in (400, 403, 404)
                    assert (await send(method, path, None))[0] in (400, 401)
            assert (await send("GET", "http://x/health", None))[0] in (200, 400, 401)  # in the form for proxies
            assert (await send("GET", "http://health/v1/models", None))[0] in (400, 401)
            assert (await send("GET", "/v1/models", None, host="x/health?"))[0] in (400, 401)

    asyncio.run(scenario())


def test_without_any_key_everybody_is_welcome_but_to_the_admin_routes(api: Api) -> None:
    assert api.get("/v1/models").status_code == api.get("/metrics").status_code == 200
    for name in ("drain", "reset_prefix_cache", "log_level", "reload_keys", ""):
        assert "--api-key-file" in error_of(api.request("POST", f"/admin/{name}"), 404)["message"]
    api.config = ServerConfig(model="tiny", api_key=["k"])  # no admin among the keys
    assert error_of(api.request("POST", "/admin/drain", headers=bearer("k")), 403)


def test_metrics_know_keys_by_their_ids(guarded: Api) -> None:
    async def scenario() -> str:
        async with guarded.client.http(guarded.config) as http:
            for key in ("user-key", "user-key", "tulip-bulb", "prom-key"):
                await http.get("/v1/models", headers=bearer(key))
            await http.get("/health")
            return (await http.get("/metrics", headers=bearer("prom-key"))).text

    text = asyncio.run(scenario())
    for labels, count in (
        ({"api_key_id": "ann", "status": "200"}, 2),
        ({"api_key_id": "invalid", "status": "401"}, 1),
        ({"api_key_id": "prometheus", "status": "403"}, 1),
    ):
        assert metric(text, "octavo_http_responses_total", **labels) == count
    assert metric(text, "octavo_http_responses_total") == 4, "probes and scrapes are not counted"
    assert "user-key" not in text and "tulip" not in text


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
}


def salts(client: FakeEngineClient) -> list[object]:
    return [options["cache_salt"] for options in client.options] + [options["cache_salt"] for _, options in client.embedded]


@pytest.mark.parametrize(("path", "body"), [*BODIES.items(), ("/v1/embeddings", {"input": "a"})])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"api_key": KEYS}, ["ann/", "ann/x", "bob/", "bob/x"]),
        ({"api_key": ["user-key ann", "other-key ann"]}, ["", "x", "", "x"]),  # one who has two keys
        ({"api_key": ["user-key ann", "other-key bob"], "shared_prefix_cache": True}, ["", "x", "", "x"]),
        ({}, ["", "x", "", "x"]),
    ],
)
def test_prefixes_are_shared_within_one_key(
    api: Api, path: str, body: dict[str, Any], settings: dict[str, Any], expected: list[str]
) -> None:
    api.config = ServerConfig(model="tiny", **settings)
    for key in ("user-key", "other-key"):
        for more in ({}, {"cache_salt": "x"}):
            assert api.request("POST", path, json={**body, **more}, headers=bearer(key)).status_code == 200
    assert salts(api.client) == expected
    long = api.request("POST", path, json={**body, "cache_salt": "x" * 257}, headers=bearer("user-key"))
    assert error_of(long, 400)["param"] == "cache_salt"


def test_no_salt_of_one_key_is_anothers() -> None:
    pairs = [("a", ""), ("a", "b"), ("a.b", ""), ("a", "/b"), ("b", "a/"), ("", "a/b")]
    made = [cache_salt({"octavo.tenant": tenant}, given) for tenant, given in pairs if tenant]
    assert len(set(made)) == len(made)


def test_stored_responses_are_their_keys_own(guarded: Api) -> None:
    async def scenario() -> None:
        async with guarded.client.http(guarded.config) as http:

            async def send(key: str, method: str, path: str, **body: Any) -> httpx.Response:
                return await http.request(method, f"/v1/responses{path}", json=body or None, headers=bearer(key))

            mine = (await send("user-key", "POST", "", input="a", request_id="same")).json()
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
                assert (await send("other-key", method, f"/{mine['id']}{path}")).status_code == 404
            error = error_of(await send("other-key", "POST", "", input="b", previous_response_id=mine["id"]), 400)
            assert error["code"] == "previous_response_not_found"
            item = {"type": "item_reference", "id": mine["output"][0]["id"]}
            assert (await send("other-key", "POST", "", input=[item])).status_code == 400
            assert (await send("user-key", "POST", "", input=[item, {"role": "user", "content": "b"}])).status_code == 200
            yours = (await send("other-key", "POST", "", input="b", request_id="same")).json()
            assert yours["id"] == mine["id"]
            assert (await send("other-key", "DELETE", f"/{yours['id']}")).status_code == 200
            assert (await send("user-key", "GET", f"/{mine['id']}")).json() == mine

    asyncio.run(scenario())


CORS = "https://chat.example.com"


def test_other_origins_get_no_leave_by_themselves(api: Api) -> None:
    preflight = {"Origin": CORS, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    refused = api.request("OPTIONS", "/v1/completions", headers=preflight)
    assert refused.status_code == 405
    for response in (refused, api.get("/v1/models", headers={"Origin": CORS})):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [[CORS, "http://localhost:3000"], ["*"]])
def test_origins_that_are_let_in(api: Api, origins: list[str]) -> None:
    api.config = ServerConfig(model="tiny", cors_origins=origins, api_key=["k"])
    preflight = {"Origin": CORS, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = api.request("OPTIONS", "/v1/completions", headers=preflight)  # browsers send it without a key
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] in (CORS, "*")
    assert "authorization" in response.headers["access-control-allow-headers"]
    browser = {"Origin": CORS, "Sec-Fetch-Site": "cross-site"}
    response = api.request("POST", "/v1/completions", json={"prompt": "a"}, headers={**browser, **bearer("k")})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] in (CORS, "*")
    refused = api.get("/v1/models", headers=browser)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] in (CORS, "*")
    other = api.get("/v1/models", headers={"Origin": "https://evil.example", **bearer("k")})
    assert other.headers.get("access-control-allow-origin") in ((None,) if CORS in origins else ("*",))


def test_a_page_elsewhere_cannot_make_a_browser_ask(api: Api) -> None:
    """A form or a fetch without CORS needs no preflight: it would keep the model busy, though nobody could read the answer."""
    body = b'{"prompt": "a"}'
    for site in ("cross-site", "same-site"):
        headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": site, "Content-Type": "text/plain"}
        assert error_of(api.request("POST", "/v1/completions", content=body, headers=headers), 403)
    assert not api.client.prompts
    for site in ("same-origin", "none"):  # our own page, and an address typed by hand
        assert api.request("POST", "/v1/completions", content=body, headers={"Sec-Fetch-Site": site}).status_code == 200


@pytest.mark.parametrize("origin", ["chat.example.com", "https://a.example/", "https://a.example/x", "https://*.example", ""])
def test_what_is_no_origin_is_told(origin: str) -> None:
    with pytest.raises(ValueError, match="cors_origins"):
        ServerConfig(model="tiny", cors_origins=[origin])


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_may_run_their_own_script_and_no_other(api: Api, path: str) -> None:
    response = api.get(path)
    policy = dict(rule.strip().split(" ", 1) for rule in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    for tag in ("script", "style"):
        for content in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", response.text, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy[f"{tag}-src"]
    assert "unsafe" not in str(policy) and not re.search(r"<[^>]+\s(style|on\w+)=", response.text)


def test_every_answer_says_that_its_type_is_meant(guarded: Api) -> None:
    for path, headers in (("/health", {}), ("/v1/models", {}), ("/v1/models", bearer("user-key")), ("/", bearer("user-key"))):
        response = guarded.get(path, headers=headers)
        assert response.headers["X-Content-Type-Options"] == "nosniff" and "server" not in response.headers
