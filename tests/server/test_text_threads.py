"""Long texts wait for a few threads, and only so much of them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from server.api import text_threads
from server.api.text_threads import LONG_TEXT_CHARS, TextThreads, in_thread_if_long
from server.errors import TooManyRequests
from tests.server.conftest import Api
from tests.server.test_bad_input import error_of


def test_short_work_stays_on_the_loop_and_long_work_leaves_it() -> None:
    async def scenario() -> None:
        assert await in_thread_if_long(LONG_TEXT_CHARS, threading.get_ident) == threading.get_ident()
        assert await in_thread_if_long(LONG_TEXT_CHARS + 1, threading.get_ident) != threading.get_ident()

    asyncio.run(scenario())


def test_few_at_a_time_and_no_more_waiting_than_the_bound() -> None:
    async def scenario() -> None:
        threads = TextThreads(num_threads=2, max_pending_chars=100)
        running, most, gate = [0], [0], threading.Event()

        def work() -> None:
            running[0] += 1
            most[0] = max(most[0], running[0])
            gate.wait(30)
            running[0] -= 1

        tasks = [asyncio.create_task(threads.run(20, work)) for _ in range(5)]
        await asyncio.sleep(0.2)
        assert threads.pending_chars == 100
        with pytest.raises(TooManyRequests):
            await threads.run(1, work)
        tasks[4].cancel()  # it had not begun
        await asyncio.gather(tasks[4], return_exceptions=True)
        assert threads.pending_chars == 80
        gate.set()
        await asyncio.gather(*tasks[:4])
        assert most[0] == 2 and threads.pending_chars == 0
        await threads.run(1000, lambda: None)  # one alone may be of any length
        with pytest.raises(ZeroDivisionError):
            await threads.run(50, lambda: 1 // 0)
        assert threads.pending_chars == 0

    asyncio.run(scenario())


def test_the_endpoints_say_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    full = TextThreads(max_pending_chars=10)
    full.pending_chars = 10
    monkeypatch.setattr(text_threads, "_text_threads", full)
    long = "a" * (LONG_TEXT_CHARS + 1)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": long}), ("/v1/embeddings", {"input": long}), ("/tokenize", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}), ("/v1/responses", {"input": long}),
    ]  # fmt: skip
    for path, body in bodies:
        response = api.request("POST", path, json=body)
        assert error_of(response, 429)["type"] == "rate_limit_error" and response.headers["Retry-After"]
    assert api.complete(prompt="short").status_code == 200
