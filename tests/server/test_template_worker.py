"""Chat templates of requests: rendered elsewhere, with bounded time and memory, while the server goes on."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from engine.chat_template import ChatJob
from engine.errors import EngineUnavailable, InvalidRequest
from server import template_worker
from server.template_worker import MAX_TEMPLATE_CHARS, TemplateWorker
from tests.server.conftest import Api
from tests.server.fake_client import FakeEngineClient

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def job(source: str, **variables: Any) -> ChatJob:
    return ChatJob(source=source, messages=[{"role": "user", "content": "Köln"}], variables=variables)


def render(worker: TemplateWorker, source: str, **variables: Any) -> str:
    return asyncio.run(worker.render(job(source, **variables)))


def test_a_process_renders_one_job_after_the_other() -> None:
    worker = TemplateWorker()
    assert render(worker, "{{ messages[0].content }}{{ x }}", x="é") == "Kölné"
    pid = worker.pid
    with pytest.raises(InvalidRequest, match="not today") as caught:
        render(worker, "{{ raise_exception('not today') }}")
    assert caught.value.param == "messages"
    assert render(worker, "again") == "again" and worker.pid == pid


def test_the_process_ends_with_its_worker() -> None:
    worker = TemplateWorker()
    assert worker.pid is None
    render(worker, "warm")
    pid = worker.pid
    assert pid is not None
    del worker
    gc.collect()  # a finished task's frames may hold it for a while
    with pytest.raises(ProcessLookupError):
        for _ in range(200):
            os.kill(pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% macro f(n) %}{% for i in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}{{ f(20) }}",
        "{{ lipsum(n=10000000) }}",
    ],
)
def test_time_is_bounded(source: str) -> None:
    worker = TemplateWorker(limit_s=0.5)
    render(worker, "warm")
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"longer than 0\.5 seconds") as caught:
        render(worker, source)
    assert caught.value.param == "chat_template" and time.monotonic() - started < 10
    assert render(worker, "again") == "again"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ [0] * 10**9 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a' * 40 * 1024 * 1024 }}",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    worker = TemplateWorker(limit_s=20)
    with pytest.raises(InvalidRequest):
        render(worker, source)
    assert render(worker, "again") == "again"


def test_a_process_that_is_gone_is_replaced() -> None:
    worker = TemplateWorker()
    render(worker, "warm")
    pid = worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while worker.pid is not None:
        time.sleep(0.01)
    assert render(worker, "again") == "again"


def test_what_cannot_be_sent_is_refused() -> None:
    worker = TemplateWorker()
    with pytest.raises(InvalidRequest) as caught:
        render(worker, "a" * (MAX_TEMPLATE_CHARS + 1))
    assert caught.value.param == "chat_template"
    for value in ("\ud800", 2**70):
        with pytest.raises(InvalidRequest):
            render(worker, "{{ x }}", x=value)
    with pytest.raises(InvalidRequest, match="Unicode"):
        render(worker, "{{ '\\ud800' }}")


def test_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "MAX_WAITING", 2)

    async def crowd() -> list[object]:
        worker = TemplateWorker()
        return await asyncio.gather(*(worker.render(job("x")) for _ in range(3)), return_exceptions=True)

    *served, refused = asyncio.run(crowd())
    assert served == ["x", "x"] and isinstance(refused, EngineUnavailable)


def test_the_server_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = TemplateWorker(limit_s=1.0)
    monkeypatch.setattr("server.api.conversation.template_worker", lambda: worker)
    client = FakeEngineClient()

    async def both() -> tuple[Any, list[float]]:
        async with client.http() as http:
            body = {"messages": [{"role": "user", "content": "u"}]}
            slow = asyncio.create_task(http.post("/v1/chat/completions", json={**body, "chat_template": ENDLESS}))
            waits = []
            while not slow.done():
                started = time.monotonic()
                await http.post("/v1/chat/completions", json=body)
                waits.append(time.monotonic() - started)
            return await slow, waits

    response, waits = asyncio.run(both())
    assert response.status_code == 400 and "longer than 1 second" in response.json()["error"]["message"]
    assert len(waits) > 5 and sorted(waits)[len(waits) // 2] < 0.5


def test_who_leaves_gives_up_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = TemplateWorker(limit_s=1.0)
    monkeypatch.setattr("server.api.conversation.template_worker", lambda: worker)
    monkeypatch.setattr(template_worker, "MAX_WAITING", 2)
    client = FakeEngineClient()

    async def leave() -> httpx.Response:
        async with client.http() as http:
            body = {"messages": [{"role": "user", "content": "u"}], "chat_template": "x"}
            slow = asyncio.create_task(http.post("/v1/chat/completions", json={**body, "chat_template": ENDLESS}))
            await asyncio.sleep(0.05)
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(http.post("/v1/chat/completions", json=body), 0.05)
            response = await http.post("/v1/chat/completions", json=body)
            await slow
            return response

    assert asyncio.run(leave()).status_code == 200
    assert len(client.prompts) == 1


def test_the_models_own_template_is_rendered_here(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> TemplateWorker:
        raise AssertionError("the model's own template needs no other process")

    monkeypatch.setattr("server.api.conversation.template_worker", fail)
    assert api.chat().status_code == 200
    assert api.chat(chat_template="default").status_code == 200
    assert api.chat(chat_template="x").status_code == 500


def test_the_process_is_light() -> None:
    code = (
        "import server.template_worker, sys; print([m for m in ('fastapi', 'tokenizers', 'torch', 'zmq') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
