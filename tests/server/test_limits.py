"""Bounds below the application: what is too long, too much or too slow is refused in OpenAI's shape; what is fine passes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Coroutine
from typing import Any

import pytest

from server import connections, limits
from server.file_limit import wanted_connections
from tests.metrics_text import metric
from tests.server.fake_client import FakeEngineClient
from tests.server.served import LIMIT_S, ask, served, talk

BODY = json.dumps({"prompt": "a"}).encode()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, LIMIT_S))


def post(body: bytes = BODY, *headers: str, length: int | None = None, close: bool = True) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", *headers]
    lines += (
        [f"Content-Length: {len(body) if length is None else length}"] if "Transfer-Encoding: chunked" not in headers else []
    )
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_what_is_within_the_bounds_is_answered() -> None:
    async def scenario() -> None:
        async with served() as (_, port):
            many = [f"X-{number}: y" for number in range(limits.MAX_HEADERS - 5)]
            long = f"X-Long: {'y' * (limits.MAX_HEADER_BYTES - 2000)}"
            for request in (post(), post(BODY, *many), post(BODY, long)):
                assert (await ask(port, request)).status == 200
            url = b"/v1/models?" + b"a" * (limits.MAX_URL_BYTES - 20)
            assert (await ask(port, b"GET " + url + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).status == 200
            chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
            assert (await ask(port, post(chunks, "Transfer-Encoding: chunked"))).status == 200

    run(scenario())


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (post(BODY, *[f"X-{number}: y" for number in range(200)]), 431, "headers_too_large"),
        (post(BODY, f"X-Long: {'y' * 70_000}"), 431, "headers_too_large"),
        (post(BODY, *[f"X-{number}: {'y' * 1000}" for number in range(90)]), 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\nX-Endless: " + b"y" * 600_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"y" * 600_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "url_too_long"),
        (b"GET /" + b"a" * 600_000, 414, "url_too_long"),
        (post(b"2;" + b"y" * 600_000, "Transfer-Encoding: chunked"), 431, "headers_too_large"),
        (post(b"0\r\nX-Trailer: " + b"y" * 600_000, "Transfer-Encoding: chunked"), 431, "headers_too_large"),
        (b"nonsense\r\n\r\n", 400, "bad_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_http"),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_http"),
        (post(BODY, "Transfer-Encoding: chunked", "Content-Length: 5"), 400, "bad_http"),
        (post(BODY, "Content-Length: 3"), 400, "bad_http"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_http"),
    ],
)  # fmt: skip
def test_what_is_not_is_refused_and_the_connection_ended(request_bytes: bytes, status: int, code: str) -> None:
    async def scenario() -> None:
        async with served() as (_, port):
            answer = await ask(port, request_bytes)
            assert (answer.status, answer.error["code"]) == (status, code)
            assert answer.headers["connection"] == "close" and "server" not in answer.headers

    run(scenario())


def test_who_expects_100_and_is_refused_gets_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with served() as (_, port):
            wrong = post(b"-1\r\n", "Transfer-Encoding: chunked", "Expect: 100-continue")
            answer = await ask(port, wrong)
            assert (answer.status, answer.error["code"]) == (400, "bad_http")

    run(scenario())
    assert "Exception" not in caplog.text


def test_bodies_that_are_too_large_by_their_length_or_by_what_comes() -> None:
    async def scenario() -> None:
        async with served(max_body_bytes=2000) as (_, port):
            announced = await ask(port, post(b"", length=2001))  # before a byte of it
            assert (announced.status, announced.error["code"]) == (413, "body_too_large")
            chunk = b"1f4\r\n" + b" " * 500 + b"\r\n"
            chunked = await ask(port, post(chunk * 5, "Transfer-Encoding: chunked"))
            assert (chunked.status, chunked.error["code"]) == (413, "body_too_large")
            assert (await ask(port, post(BODY.ljust(2000)))).status == 200
            # What goes on being sent after the answer is thrown away, but not without end.
            assert len(await talk(port, post(chunk * 5, "Transfer-Encoding: chunked", close=False), chunk * 1000)) < 2000

    run(scenario())


def test_strangers_are_refused_before_their_body_is_looked_at() -> None:
    async def scenario() -> None:
        async with served(api_key=["k"], max_body_bytes=2000) as (_, port):
            answer = await ask(port, post(b"", length=10**9))
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")

    run(scenario())


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([], None),
        ([b"\r\n", b"\r\n"], 408),
        ([b"POST /v1/comp"], 408),
        ([b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n", b"X-More: y\r\n"], 408),
        ([post(BODY[:4], length=len(BODY))], 408),
        ([post(b"5\r\n{", "Transfer-Encoding: chunked")], 408),
    ],
)
def test_what_does_not_come_in_time_is_given_up(parts: list[bytes], status: int | None) -> None:
    async def scenario() -> None:
        async with served(read_timeout_s=0.5) as (_, port):
            if status is None:
                assert await talk(port) == b""
                return
            answer = await ask(port, *parts)
            assert (answer.status, answer.error["code"]) == (status, "request_timeout")

    run(scenario())


def test_a_byte_now_and_then_is_not_in_time() -> None:
    async def scenario() -> None:
        async with served(read_timeout_s=0.5) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n")
            while not reader.at_eof():
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.05)
                if await asyncio.wait_for(_peek(reader), LIMIT_S):
                    break
            assert b"408 Request Timeout" in await reader.read()
            writer.close()

    run(scenario())


async def _peek(reader: asyncio.StreamReader) -> bool:
    return bool(reader._buffer)  # type: ignore[attr-defined]


def test_the_time_limit_is_for_sending_not_for_waiting() -> None:
    async def scenario() -> None:
        client = FakeEngineClient()
        client.gate.clear()
        async with served(client, read_timeout_s=0.2) as (_, port):
            asking = asyncio.create_task(ask(port, post()))
            waiting = asyncio.create_task(ask(port, post(close=False) + post()))  # the second waits for the first's answer
            await asyncio.sleep(1.0)
            assert not asking.done() and not waiting.done()
            client.gate.set()
            assert (await asking).status == (await waiting).status == 200

    run(scenario())


def test_a_kept_connection_may_be_used_again() -> None:
    async def scenario() -> None:
        async with served(read_timeout_s=LIMIT_S) as (_, port):
            answers = await talk(port, post(close=False), post(close=False), post())
            assert answers.count(b"HTTP/1.1 200 OK") == 3

    run(scenario())


def test_one_connection_too_many_is_told_so_at_once_and_the_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with served(max_connections=2) as (_, port):
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for _ in range(2):
                answer = await ask(port)  # without a byte of a request
                assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
                assert answer.headers["connection"] == "close" and answer.headers["retry-after"] == "1"
            assert (await ask(port, post())).status == 503
            for reader, writer in idle:  # those that were there are as they were
                writer.write(post())
                assert b"200 OK" in await asyncio.wait_for(reader.read(), LIMIT_S)
                writer.close()
            assert (await ask(port, post())).status == 200
            scraped = await ask(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert metric(scraped.body.decode(), "octavo_connections_refused_total") == 3

    run(scenario())
    warnings = [record.getMessage() for record in caplog.records if "--max-connections" in record.getMessage()]
    assert warnings == ["2 connections are open: more are refused (--max-connections)"]


def test_many_connections_too_many_are_closed_without_a_word() -> None:
    async def scenario() -> None:
        async with served(max_connections=1) as (server, port):
            pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections.MOST_REFUSED + 20)]
            others = [await asyncio.wait_for(_rest(reader), LIMIT_S) for reader, _ in pairs[1:]]
            told = [text for text in others if text]
            assert 0 < len(told) < len(others) and all(text.startswith(b"HTTP/1.1 503 ") for text in told)
            for _, writer in pairs:
                writer.close()
            while server.server_state.connections:
                await asyncio.sleep(0.01)
            assert (await ask(port, post())).status == 200  # all places are free again

    run(scenario())


async def _rest(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


def test_places_are_given_back() -> None:
    bound = connections.ConnectionBound(2)
    places = [bound.enter() for _ in range(2 + connections.MOST_REFUSED + 1)]
    assert places == ["served"] * 2 + ["refused"] * connections.MOST_REFUSED + ["dropped"]
    bound.leave("refused")
    assert bound.enter() == "refused" and bound.enter() == "dropped"
    bound.leave("served")
    assert bound.enter() == "served" and bound.enter() == "dropped"


def test_there_are_more_connections_than_requests() -> None:
    """Also where only one request may be open: who comes beside it is to be told that by a 429, and probes by their answer."""
    assert [wanted_connections(None, requests) for requests in (0, 1, 1024, 2000)] == [16_384, 4096, 4096, 8000]
    assert wanted_connections(20, 4096) == 20


def test_the_bound_is_what_the_system_allows() -> None:
    code = (
        "import resource; from server.file_limit import *; from engine.errors import ConfigError\n"
        "for most in (60, 1000, 4000):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "    print(possible_connections(None, 4096), possible_connections(None, 5), possible_connections(20, 4096))\n"
        "    try: print(possible_connections(800, 4096))\n"
        "    except ConfigError as error: print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    small, refused, middle, refused_too, large, given = done.stdout.splitlines()
    assert (small, middle, large, given) == ("30 30 20", "744 744 20", "3744 3744 20", "800")
    assert "800 connections need 1056 open files, and this process may have 60" in refused and "1000" in refused_too
