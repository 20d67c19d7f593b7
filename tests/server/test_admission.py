"""No more requests are open at once than the server takes, and every one is counted until it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from engine.errors import InvalidRequest
from server.admission import UNCOUNTED_PATHS
from server.config import ServerConfig
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient
from tests.server.test_bad_input import error_of

LIMIT = 3
PATH = "/v1/completions"


def scenario(run: Callable[[FakeEngineClient, httpx.AsyncClient], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        client = FakeEngineClient()
        async with client.http(ServerConfig(model="tiny", **{"max_open_requests": LIMIT, **settings})) as http:
            await run(client, http)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_burst_does_not_pass_the_limit(stream: bool) -> None:
    async def run(client: FakeEngineClient, http: httpx.AsyncClient) -> None:
        client.gate.clear()
        body = {"prompt": "a", "stream": stream}
        burst = [asyncio.create_task(http.post(PATH, json=body)) for _ in range(10)]
        while len(client.streams) < LIMIT or sum(task.done() for task in burst) < 10 - LIMIT:
            await asyncio.sleep(0.01)
        refused = [task for task in burst if task.done()]
        assert len(refused) == 10 - LIMIT and len(client.streams) == LIMIT
        for task in refused:
            error = error_of(task.result(), 429)
            assert error["code"] == "rate_limit_exceeded" and error["type"] == "rate_limit_error"
            assert int(task.result().headers["Retry-After"]) >= 1
        for path in UNCOUNTED_PATHS:
            assert (await http.get(path)).status_code != 429
        client.gate.set()
        assert sorted([(await task).status_code for task in burst]) == [200] * LIMIT + [429] * (10 - LIMIT)
        assert (await http.post(PATH, json=body)).status_code == 200  # there is room again

    scenario(run)


def test_every_end_of_a_request_makes_room() -> None:
    async def run(client: FakeEngineClient, http: httpx.AsyncClient) -> None:
        for _ in range(2 * LIMIT):
            assert (await http.post(PATH, content=b"{")).status_code == 400
            assert (await http.get("/nowhere")).status_code == 404
            client.refusal = InvalidRequest("no")
            assert (await http.post(PATH, json={"prompt": "a"})).status_code == 400
            client.refusal = RuntimeError("a bug")  # type: ignore[assignment]
            assert (await http.post(PATH, json={"prompt": "a"})).status_code == 500
            client.refusal, client.fail_after = None, 1
            assert (await http.post(PATH, json={"prompt": "a", "stream": True})).status_code == 200
            client.fail_after = None
            client.gate.clear()
            gone = asyncio.create_task(http.post(PATH, json={"prompt": "a"}))
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.wait({gone})
            client.gate.set()
        assert (await http.post(PATH, json={"prompt": "a"})).status_code == 200

    scenario(run)


def test_strangers_are_not_counted() -> None:
    async def run(client: FakeEngineClient, http: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*[http.post(PATH, json={"prompt": "a"}) for _ in range(3 * LIMIT)])
        assert {answer.status_code for answer in answers} == {401}

    scenario(run, api_key=["secret"])


def test_no_limit() -> None:
    async def run(client: FakeEngineClient, http: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*[http.post(PATH, json={"prompt": "a"}) for _ in range(50)])
        assert {answer.status_code for answer in answers} == {200}

    scenario(run, max_open_requests=0, max_waiting_requests=0)


def test_the_default_limit_lets_a_crowd_in(api: Api) -> None:
    assert api.config.max_open_requests == 4096
    assert api.complete(prompt="a").status_code == 200
