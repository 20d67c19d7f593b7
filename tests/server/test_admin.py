"""The routes for the server's owner, the metrics port, and what is said of a server that others can reach."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from engine.client import EngineClient
from engine.errors import ConfigError
from server.app import create_app, create_server
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.served import ask, served
from tests.server.test_bad_input import error_of

ADMIN = {"Authorization": "Bearer admin-key"}
CONFIG = ServerConfig(model="tiny", api_key=["user-key", "admin-key ops admin"])


@pytest.fixture
def root_level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


def post(client: FakeEngineClient, path: str, body: Any = None, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        app = create_app(cast(EngineClient, client), CONFIG, **options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return await http.post(path, json=body, headers=ADMIN)

    return asyncio.run(send())


def test_drain_does_what_it_is_given_to_do() -> None:
    calls: list[str] = []
    client = FakeEngineClient()
    for _ in range(2):
        response = post(client, "/admin/drain", on_drain=lambda: calls.append("drain"))
        assert response.status_code == 202 and response.json() == {"status": "draining"}
    assert calls == ["drain", "drain"]
    assert "SIGTERM" in error_of(post(client, "/admin/drain"), 503)["message"]


def test_the_prefix_cache_is_forgotten() -> None:
    class Client(FakeEngineClient):
        resets = 0

        def reset_prefix_cache(self) -> None:
            self.resets += 1

    client = Client()
    assert post(client, "/admin/reset_prefix_cache").json() == {"status": "reset"}
    assert client.resets == 1
    client.state = "starting"
    assert post(client, "/admin/reset_prefix_cache").status_code == 503 and client.resets == 1


def test_the_key_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    file.write_text("ann-key ann\nadmin-key ops admin\n")
    file.chmod(0o600)

    async def scenario() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        async with client.http(ServerConfig(model="tiny", api_key=["flag-key"], api_key_file=str(file))) as http:

            async def ask_with(key: str) -> httpx.Response:
                body = {"prompt": "a", "cache_salt": "s"}
                return await http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

            async def reload(admin: str = "admin-key") -> httpx.Response:
                return await http.post("/admin/reload_keys", headers={"Authorization": f"Bearer {admin}"})

            open_request = asyncio.create_task(ask_with("ann-key"))
            while not client.streams:
                await asyncio.sleep(0)
            assert (await ask_with("bob-key")).status_code == 401
            for text, reason in (
                ("bob-key bob\n", "without one of scope admin"),
                ("bob-key\nadmin-key ops admin\n", "line 1: a key needs an id"),
                ("", "holds no key"),
                ("bob-key bob\nadmin-key ops amdin\n", "line 2: a scope must be"),
            ):
                file.write_text(text)
                message = error_of(await reload(), 400)["message"]
                assert reason in message and "bob-key" not in message
            file.write_text("bob-key bob\nnew-admin-key ops admin\n")
            file.chmod(0o644)
            assert (await reload("ann-key")).status_code == 403
            assert (await reload()).json() == {"status": "reloaded"}
            client.gate.set()
            assert (await open_request).status_code == 200, "a request that is open goes on"
            assert [(await ask_with(key)).status_code for key in ("ann-key", "bob-key", "flag-key")] == [401, 200, 200]
            assert (await reload()).status_code == 401 and (await reload("new-admin-key")).status_code == 200
        assert [options["cache_salt"] for options in client.options] == ["ann/s", "bob/s", "key1/s"]

    asyncio.run(scenario())
    assert "chmod 600" in caplog.text and "3 API keys after a reload, asked for by key ops" in caplog.text
    assert "bob-key" not in caplog.text
    refused = post(FakeEngineClient(), "/admin/reload_keys")
    assert "--api-key-file" in error_of(refused, 400)["message"]


def test_a_second_key_id_that_a_reload_brings_shares_nothing_with_the_first(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ann-key ann api admin\n")

    async def scenario() -> None:
        client = FakeEngineClient()
        async with client.http(ServerConfig(model="tiny", api_key_file=str(file))) as http:

            async def send(path: str, key: str) -> None:
                response = await http.post(path, json={"prompt": "a"}, headers={"Authorization": f"Bearer {key}"})
                assert response.status_code == 200

            await send("/v1/completions", "ann-key")
            file.write_text("bob-key bob\nann-key ann api admin\n")
            await send("/admin/reload_keys", "ann-key")
            await send("/v1/completions", "ann-key")
            await send("/v1/completions", "bob-key")
        assert [options["cache_salt"] for options in client.options] == ["", "ann/", "bob/"]

    asyncio.run(scenario())


@pytest.mark.usefixtures("root_level")
def test_the_log_level_is_set() -> None:
    client = FakeEngineClient()
    for level in ("debug", "warning", "info"):
        assert post(client, "/admin/log_level", {"level": level}).json() == {"status": level}
        assert logging.getLogger().level == getattr(logging, level.upper())
    for body in ({}, {"level": "loud"}, {"level": 10}, []):
        error_of(post(client, "/admin/log_level", body), 400)
    assert logging.getLogger().level == logging.INFO
    assert client.log_levels == ["info", "warning", "info"], "at debug the engine's libraries would say too much"


def test_admin_routes_are_posted_to(api: Api) -> None:
    api.config = CONFIG
    for name in ("drain", "reset_prefix_cache", "log_level", "reload_keys"):
        assert error_of(api.get(f"/admin/{name}", headers=ADMIN), 405)


def test_metrics_on_a_port_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            free = taken.getsockname()[1]
        async with served(api_key=["k"], metrics_port=free) as (_, port):

            async def get(at: int, line: str) -> Any:
                return await ask(at, f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())

            assert (await get(port, "GET /metrics")).status == 401
            answer = await get(free, "GET /metrics")
            assert answer.status == 200 and b"octavo_num_requests_running" in answer.body
            assert (await get(free, "HEAD /metrics")).status == 200
            for line in (
                "GET /",
                "GET /v1/models",
                "POST /v1/completions",
                "POST /metrics",
                "POST /admin/drain",
                "GET /health",
            ):
                assert (await get(free, line)).error["code"] == "not_found"
            with pytest.raises(ConfigError, match="--metrics-port"):
                create_server(cast(EngineClient, FakeEngineClient()), ServerConfig(model="tiny", metrics_port=free))
        with socket.create_server(("127.0.0.1", free)):  # closed with the server
            pass

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({}, []),
        ({"host": "localhost"}, []),
        ({"host": "::1", "metrics_port": 0}, []),
        ({"host": "0.0.0.0"}, ["no API key"]),
        ({"host": "::"}, ["no API key"]),
        ({"host": "10.0.0.1"}, ["no API key"]),
        ({"host": "0.0.0.0", "api_key": ["k"]}, ["unencrypted"]),
        ({"host": "0.0.0.0", "api_key": ["k"], "metrics_port": 0}, ["unencrypted", "metrics"]),
    ],
)
def test_what_others_could_do_is_warned_of(
    caplog: pytest.LogCaptureFixture, settings: dict[str, Any], warnings: list[str]
) -> None:
    caplog.set_level(logging.WARNING)
    create_server(cast(EngineClient, FakeEngineClient()), ServerConfig(model="tiny", **settings))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(warnings) and all(word in line for word, line in zip(warnings, lines, strict=True))


def test_by_default_only_this_machine_is_listened_to() -> None:
    assert ServerConfig().host == "127.0.0.1"
