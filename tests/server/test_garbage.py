"""What a request made goes with it. Objects that know each other in a circle would stay until a garbage collection, of which a
server has few: by then it has answered thousands, and the collection holds up every stream."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from typing import Any

import pytest

from engine.sampling_params import SamplingParams
from tests.server.served import LIMIT_S, ask, served
from tests.server.test_streaming import LiveClient

MESSAGES = [{"role": "user", "content": "a"}]


class SpeakingClient(LiveClient):
    """Says "ab" to whoever asks, a little later, and keeps nothing of it."""

    num_open = 0

    async def generate(self, prompt_token_ids: list[int], sampling: SamplingParams, **options: Any) -> Any:
        stream = await super().generate(prompt_token_ids, sampling, **options)
        self.num_open += 1
        asyncio.get_running_loop().call_later(0.01, self.speak, len(self.live) - 1, sampling.n)
        return stream

    def speak(self, index: int, num_choices: int) -> None:
        for choice in range(num_choices):
            self.say(index, "a", choice=choice)
            self.say(index, "b", choice=choice, finish="stop")
        self.num_open -= 1
        if not self.num_open:
            self.live.clear()
            self.sampling.clear()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a"}),
        ("completions", {"prompt": ["a", "b"], "n": 2}),
        ("completions", {"prompt": "a", "stream": True}),
        ("completions", {"prompt": ["a", "b"], "n": 2, "stream": True}),
        ("completions", {"prompt": "a", "max_tokens": -1}),
        ("completions", {"prompt": "a", "model": "none"}),
        ("chat/completions", {"messages": MESSAGES}),
        ("chat/completions", {"messages": MESSAGES, "stream": True}),
        ("responses", {"input": "a", "store": False}),
        ("responses", {"input": "a", "store": False, "stream": True}),
        ("embeddings", {"input": "a"}),
        ("nowhere", {}),
    ],
)
def test_nothing_of_a_request_waits_for_the_collector(path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data

    async def scenario() -> list[Any]:
        async with served(SpeakingClient()) as (_, port):
            await ask(port, request)  # what is made once, is made
            await asyncio.sleep(0)
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            for _ in range(3):
                await ask(port, request)
            await asyncio.sleep(0.05)
            gc.collect()
            gc.set_debug(0)
            left, gc.garbage[:] = list(gc.garbage), []
            return left

    gc.disable()
    try:
        left = asyncio.run(asyncio.wait_for(scenario(), LIMIT_S))
    finally:
        gc.set_debug(0)
        gc.enable()
    ours = Counter(
        type(each).__qualname__ for each in left if type(each).__module__.startswith(("server.", "engine.", "uvicorn."))
    )
    assert not ours, ours
