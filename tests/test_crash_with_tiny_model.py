"""`octavo serve` with a tiny model in float32, whose engine is killed again and again: every answer is what it would have been.

Thirty-two requests at once, streamed and not, of every kind whose state lives in the engine: penalties, grammars, bad words,
logprobs, several choices, stop strings, embeddings. They are asked once undisturbed, and under each kind of fire.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import tiny_models
from tests.test_server_with_demo_model import START_TIMEOUT_S, Server, free_port

NUM_REQUESTS = 32
MAX_TOKENS = 150
TOLERANCE = 2e-4  # of logprobs: a replayed position is computed among others, and its sums run in another order

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 60}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0, "stream": True},
    {"temperature": 1, "stream": True, "logprobs": 3},
    {
        "temperature": 1,
        "stream": True,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logprobs": 0,
    },
    {"temperature": 0.8, "stream": True, "n": 3, "top_p": 0.9},
    {"temperature": 1, "stream": True, "guided_regex": "[a-z ]{100,120}"},
    {"temperature": 1, "stream": True, "guided_json": SCHEMA},
    {
        "temperature": 1,
        "stream": True,
        "bad_words": ["th", " the quick", "ab"],
        "min_tokens": MAX_TOKENS - 2,
        "ignore_eos": False,
    },
    {"temperature": 0, "stream": True, "prompt_logprobs": 2, "repetition_penalty": 1.3},
    {"temperature": 1, "n": 2, "best_of": 4},
    {"temperature": 1, "logprobs": 2},
)


@dataclass
class Answer:
    """One answer, put together. text, tokens, logprobs: by choice."""

    text: dict[int, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    prompt_logprobs: list[Any] = field(default_factory=list)
    error: Any = None
    num_chunks: int = 0
    num_output_tokens: int = 0

    def take(self, body: dict[str, Any]) -> None:
        if "error" in body:
            self.error = body["error"]
            return
        self.num_chunks += 1
        self.num_output_tokens = (body.get("usage") or {}).get("completion_tokens", self.num_output_tokens)
        for choice in body["choices"]:
            index = choice["index"]
            self.text[index] = self.text.get(index, "") + choice["text"]
            if choice["finish_reason"]:
                assert index not in self.ends, "a choice ended twice"
                self.ends[index] = choice["finish_reason"]
            if choice.get("logprobs"):
                self.tokens.setdefault(index, []).extend(choice["logprobs"]["tokens"])
                self.logprobs.setdefault(index, []).extend(choice["logprobs"]["token_logprobs"])
            if choice.get("prompt_logprobs"):
                self.prompt_logprobs.append(choice["prompt_logprobs"])


class Crowd:
    """All requests at once, with the same seeds each time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers = [Answer() for _ in range(NUM_REQUESTS)]
        self.vector: list[float] = []

    @property
    def num_chunks(self) -> int:
        return sum(answer.num_chunks for answer in self.answers)

    def body(self, i: int) -> dict[str, Any]:
        prompt = "the printer folds the sheet " * (1 + i % 5) + f"{i}"
        stop = {"stop": ["qz", "jumps o"]} if i % 3 == 0 else {}
        return {"prompt": prompt, "max_tokens": MAX_TOKENS, "seed": 1000 + i, **stop, **KINDS[i % len(KINDS)]}

    async def _ask(self, http: httpx.AsyncClient, i: int) -> None:
        body, answer = self.body(i), self.answers[i]
        if not body.get("stream"):
            answer.take((await http.post("/v1/completions", json=body)).json())
            return
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    answer.take(json.loads(line[6:]))

    async def _embed(self, http: httpx.AsyncClient) -> None:
        response = await http.post("/v1/embeddings", json={"input": "a book printed in octavo " * 12})
        self.vector = response.json()["data"][0]["embedding"]

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=1100, limits=limits) as http:
            await asyncio.gather(*(self._ask(http, i) for i in range(NUM_REQUESTS)), self._embed(http))

    def run(self) -> None:
        asyncio.run(self._run())


def compare(disturbed: Crowd, undisturbed: Crowd) -> None:
    for i, (one, other) in enumerate(zip(disturbed.answers, undisturbed.answers, strict=True)):
        what = f"request {i}: {disturbed.body(i)}"
        assert one.error is None and other.error is None, (what, one.error, other.error)
        assert one.text == other.text, what
        assert one.ends == other.ends and one.tokens == other.tokens, what
        assert one.num_output_tokens == other.num_output_tokens, what
        for index, values in other.logprobs.items():
            assert one.logprobs[index] == pytest.approx(values, abs=TOLERANCE), what
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs), what
    assert disturbed.vector == pytest.approx(undisturbed.vector, abs=1e-5)


def engine_of(server: Server) -> psutil.Process | None:
    """The engine process of this moment, once it goes by its name."""
    for child in psutil.Process(server.process.pid).children():
        try:
            if "octavo: engine" in " ".join(child.cmdline()):
                return child
        except psutil.Error:
            continue
    return None


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """`octavo serve` of a tiny model made in `folder`, in float32, ready. With any time to wait, as `start_server`."""
    tiny_models.build("llama", folder / "model")
    port, log = free_port(), folder / "log"
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        str(folder / "model"),
        "--dtype",
        "float32",
        "--port",
        str(port),
        "--max-wait-s",
        "0",
        *flags,
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        print(log.read_text()[-4000:])
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--device", "cpu", "--num-threads", "1", "--kv-cache-memory-bytes", "32M")
    with serving(tmp_path_factory.mktemp("tiny"), *flags) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> Crowd:
    crowd = Crowd(server.url)
    crowd.run()
    return crowd


def wait_until_ready(server: Server) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert server.process.poll() is None, f"the server ended with {server.process.returncode}:\n{server.log.read_text()}"
        try:
            if httpx.get(f"{server.url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready in time:\n{server.log.read_text()}")


class Killer:
    """Kills the engine whenever the crowd has got so far, and notes how its frontend takes it."""

    def __init__(self, server: Server, crowd: Crowd, goals: list[int], number: signal.Signals) -> None:
        self._server = server
        self._crowd = crowd
        self._goals = goals
        self._number = number
        self.num_kills = 0
        self.live_statuses: set[int] = set()

    def run(self) -> None:
        for goal in self._goals:
            while self._crowd.num_chunks < goal:
                time.sleep(0.005)
                if self._server.process.poll() is not None:
                    return
            engine = engine_of(self._server)
            assert engine is not None
            started_s, num_chunks = time.monotonic(), self._crowd.num_chunks
            os.kill(engine.pid, self._number)
            self.num_kills += 1
            while httpx.get(f"{self._server.url}/health/ready").status_code == 200:
                time.sleep(0.01)
            noticed_s = time.monotonic() - started_s
            while httpx.get(f"{self._server.url}/health/ready").status_code != 200:
                self.live_statuses.add(httpx.get(f"{self._server.url}/health/live").status_code)
                time.sleep(0.05)
            resumed_s = time.monotonic() - started_s
            print(f"killed after {num_chunks} chunks: not ready after {noticed_s:.2f} s, ready again after {resumed_s:.2f} s")


def under_fire(server: Server, undisturbed: Crowd, goals: list[int], number: signal.Signals) -> None:
    disturbed, total = Crowd(server.url), undisturbed.num_chunks
    killer = Killer(server, disturbed, [1 + goal * total // 100 for goal in goals], number)
    thread = threading.Thread(target=killer.run, daemon=True)
    thread.start()
    disturbed.run()
    thread.join(60)
    assert killer.num_kills == len(goals) and killer.live_statuses == {200}
    assert server.process.poll() is None, "the frontend is the same process"
    compare(disturbed, undisturbed)
    wait_until_ready(server)


@pytest.mark.timeout(1200)
def test_answers_are_the_same_after_kills(server: Server, undisturbed: Crowd, run_all: bool) -> None:
    """In per cent of what the undisturbed crowd says: the first tokens, early, middle and late ones."""
    goals = [0, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 35, 40, 45, 50, 56, 62, 70, 78, 86] if run_all else [0, 30, 75]
    under_fire(server, undisturbed, goals, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_answers_are_the_same_after_a_segfault(server: Server, undisturbed: Crowd) -> None:
    under_fire(server, undisturbed, [20], signal.SIGSEGV)


@pytest.mark.timeout(600)
def test_answers_are_the_same_after_a_standstill(server: Server, undisturbed: Crowd) -> None:
    under_fire(server, undisturbed, [40], signal.SIGSTOP)
    assert "where the engine's threads were" in server.log.read_text()
